"""Target features from vLLM's own hidden-state extraction: the second engine of `collect`.

`capture.py` runs in our process, `driver.py` and `hidden_state_files.py` in vLLM's environment,
where nothing of ours is installed: docs/decisions/0008-vllm-capture.md.
"""
