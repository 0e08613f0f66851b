"""vLLM in process.  vLLM itself is imported when an engine starts."""
