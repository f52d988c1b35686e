"""lm-eval's tasks over an engine in this process; needs the extra `eval`."""
