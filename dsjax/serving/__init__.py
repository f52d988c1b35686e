"""An engine behind OpenAI's API over HTTP."""
