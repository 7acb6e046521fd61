"""Does a real server do with a drafter what our decoder does? A verdict for each server.

`check.py` reads top to bottom: prompts, our own decoding (`own_steps.py`), the servers'
(`vllm_engine.py` runs vLLM in an environment of its own, `running_server.py` asks an address), the
comparison of both (`comparison.py`, `near_tie.py`), and the sentence about it (`verdict.py`).
"""
