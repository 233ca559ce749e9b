"""The harnesses: what tests stand on. No file here holds a test, and no test imports from another folder's conftest.

- `materials`: a tiny Llama and a tiny text, for whatever runs the command line (fixture ``materials``).
- `e2e`: the command line in a process of its own, and what it ended with (fixtures ``dstrain``, ``dstrain_here``).
- `made_run`: a run and its export, which each command finds as it was; `os_errors`: errors of the operating system at
  any file operation of a command, its children and its ranks.
- `plans`: a model's shape, its data and a plan as numbers only, for tests of `dstrain.planning`: nothing is measured.
- `model_families`: tiny configurations of many families, and Hugging Face's model with the weights of our layers.
- `bad_inputs`: what users get wrong, as tables: the words typed, the files there, and what the one message must say.
- `forking`: interpreters that have imported everything before they start. A run is the real tree of processes, without
  the seconds that each of them would import torch.
- `distributed`: a training as a job of gloo workers. `workers` runs a job in a world of them; `layout_case` and
  `training` train one small model in any layout; `yardsticks` does so without dstrain; `compare` says how far two
  trainings may be apart; `covering` chooses layouts so that every three choices meet; `elsewhere` goes on in another
  layout; `memory_run` counts tensors, `counting` the bytes sent, `timed` the seconds of a step;
  `simulation` runs DeepSpeed's schedules without a model.
- `nvml`: NVIDIA's driver where there is none: a module in place of nvidia-ml-py's, a library for the real one.
- `cluster`: three hosts on one machine, as network namespaces with sshd between them, and a Slurm on them; how they
  fail (`host`, `hosts`), commands on them (`commands`), what is missing to try it (`needs`).
- `image`: a Docker engine, the machine's own or one that lasts as long as the tests, and a base to build on.
- `torture`: runs that are killed at a chosen moment, and what must be true of them after each kill.
"""
