"""What is timed, and how: ``timing.py`` takes samples in turn and says what they are worth.

On the CPU each contender (``contenders.py``; built by ``torch_contenders.py`` or ``peers.py``) is a process of its own
(``team.py``, ``worker.py``), and all of them solve one ``contest.py``, whose result is checked. On a GPU they are functions in one
process: ``gpu_peers.py``, timed by ``gpu_timing.py``, checked by ``gpu_contest.py`` (convolutions) and ``gpu_modules.py``.
``output.py`` prints.
"""
