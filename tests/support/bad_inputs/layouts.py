"""Choices that are right one by one, and can't be together: layouts, batches, refusals, places."""

from __future__ import annotations

from tests.support.bad_inputs.row import GOOD, BadInput, bare, run
from tests.support.materials import LLAMA

_FOUR = {"h": "localhost slots=4\n"}
_MODEL = {"m/config.json": LLAMA | {"num_hidden_layers": 6}}

LAYOUTS = {
    # --- devices
    "3 stages on 4 slots": run(
        "--hostfile", "h", "--pipeline", "3", files=_FOUR,
        place="--pipeline", reason="4 devices can't be divided evenly into 3 stages",
        hint="--pipeline 1 or 2 or 4 uses all 4",
    ),
    "too many replicas": run(
        "--hostfile", "h", "--pipeline", "2", "--data-parallel", "3", files=_FOUR,
        place="--pipeline", reason="2 stages x 3 replicas need 6 devices, but there are 4", hint="--data-parallel 2",
    ),
    "far too many replicas": run(
        "--hostfile", "h", "--data-parallel", "1000000", files=_FOUR,
        place="default", reason="need 1000000 devices, but there are 4", hint="--data-parallel 4",
    ),
    "uneven hosts": run(
        "--hostfile", "h", "--global-batch", "12", files={"h": "a slots=4\nb slots=2\n"},
        place="--hostfile", reason="unevenly (a 4, b 2)", hint="slots",
    ),
    # --- a search that has nothing left
    "fit: a partition of another model": bare(
        "plan", *GOOD[:-2], "--device", "l4", "--fit", "--pipeline", "2", "--partition", "9,9",
        place="--partition", reason="has 18 blocks in total, but the model has", hint="--partition 1,1",
    ),
    "fit: a partition with an empty stage": bare(
        "plan", *GOOD[:-2], "--device", "l4", "--fit", "--pipeline", "3", "--partition", "1,0,1",
        place="--partition", reason="leaves stage 2 of 3 without a layer", hint="may have 0 blocks",
    ),
    "fit: a schedule that wants stages": bare(
        "plan", *GOOD[:-2], "--device", "l4", "--fit", "--schedule", "dualpipev", "--zero", "3",
        place="--schedule", reason="ZeRO-3 initialises the gradients of both", hint="--zero 2 with dualpipev",
    ),
    "fit: a DeepSpeed key that there is not": bare(
        "plan", *GOOD[:-2], "--fit", "--set", "deepspeed.gradient_cliping=1",
        place="--set deepspeed.gradient_cliping", reason="no key 'gradient_cliping'", hint="gradient_clipping",
    ),
    # --- stages and layers
    "more stages than layers": run(
        "--pipeline", "5", place="--pipeline", reason="5 stages are more than the model's 4 layers",
        hint="--pipeline 4 or less",
    ),
    "a thousand million stages": run(
        "--pipeline", "1000000000", place="--pipeline", reason="more than the model's 4 layers",
        hint="--pipeline 4 or less",
    ),
    "dualpipev with one stage": run(
        "--schedule", "dualpipev", place="--schedule", reason="requires --pipeline 2 or more",
        hint="--pipeline 2 or more"
    ),
    "dualpipev with more spans than layers": run(
        "--schedule", "dualpipev", "--pipeline", "3", "--global-batch", "48",
        place="--pipeline", reason="6 stages (two a rank with dualpipev)", hint="--pipeline 2 or less",
    ),
    "dualpipev with too few micro-batches": run(
        "--schedule", "dualpipev", "--pipeline", "2", "--global-batch", "6", "--micro-batch", "2",
        place="--schedule", reason="requires 4 micro-batches per step, but there are 3",
        hint="--global-batch 8 or more",
    ),
    "zb-h1 with one stage": run(
        "--schedule", "zb-h1", place="--schedule", reason="requires --pipeline 2 or more",
        hint="--pipeline 2 or more, or --schedule 1f1b",
    ),
    "zb-h1 with ZeRO-3": run(
        "--schedule", "zb-h1", "--pipeline", "2", "--zero", "3",
        place="--schedule", reason="ZeRO-3", hint="--zero 2 with zb-h1",
    ),
    "zb-h1 with ZeRO-2 and offload": run(
        "--schedule", "zb-h1", "--pipeline", "2", "--zero", "2", "--offload", "cpu",
        place="--offload", reason="ZeRO-2", hint="--zero 1 with zb-h1",
    ),
    "dualpipev with ZeRO-3": run(
        "--schedule", "dualpipev", "--pipeline", "2", "--zero", "3",
        place="--schedule", reason="ZeRO-3", hint="--zero 2 with dualpipev",
    ),
    "dualpipev with ZeRO-2 and offload": run(
        "--schedule", "dualpipev", "--pipeline", "2", "--zero", "2", "--offload", "cpu",
        place="--offload", reason="ZeRO-2", hint="--zero 1 with dualpipev",
    ),
    "partition: a word that is none": run(
        "--partition", "unifrom", place="--partition", reason="unknown partition 'unifrom'",
        hint="did you mean uniform?"
    ),
    "partition: numbers and words": run(
        "--partition", "1,x", "--pipeline", "2", place="--partition", reason="unknown partition '1,x'", hint="5,5,5,1"
    ),
    "partition: negative": run(
        "--partition", "3,-1", "--pipeline", "2", place="--partition", reason="unknown partition '3,-1'", hint="5,5,5,1"
    ),
    "partition: too few numbers": run(
        "--partition", "2", "--pipeline", "2", place="--partition", reason="--pipeline 2 needs 2",
        hint="--partition 4,4"
    ),
    "partition: too many blocks": run(
        "--partition", "2,2", "--pipeline", "2", place="--partition", reason="has 4 blocks in total",
        hint="--partition 1,1"
    ),
    "partition: a stage in the middle without a block": run(
        "--partition", "1,0,1", "--pipeline", "3", place="--partition", reason="stage 2 of 3 without a layer",
        hint="only the first"
    ),
    "partition: huge numbers": run(
        "--partition", "9" * 30 + ",1", "--pipeline", "2", place="--partition", reason="blocks", hint="--partition"
    ),
    # --- batches
    "batch not divisible by replicas": run(
        "--data-parallel", "3", "--micro-batch", "2",
        place="quickstart.yaml", reason="a global batch of 16 can't be divided evenly among 3 replicas",
        hint="--global-batch 12 or 18",
    ),
    "batch smaller than the replicas": run(
        "--data-parallel", "32", "--global-batch", "16",
        place="--global-batch", reason="16 can't be divided evenly among 32", hint="--global-batch 128",
    ),
    "micro-batch not divisible": run(
        "--micro-batch", "5", place="--micro-batch", reason="gets 16 samples per step",
        hint="--micro-batch 1, 2, 4, 8, 16"
    ),
    "micro-batch larger than the batch": run(
        "--micro-batch", "64", place="--micro-batch", reason="not a multiple of the micro-batch 64",
        hint="1, 2, 4, 8, 16"
    ),
    "an enormous batch": run(
        "--global-batch", "999999999989", "--micro-batch", "7",
        place="--micro-batch", reason="not a multiple of the micro-batch 7", hint="--micro-batch 1",
    ),
    # --- refusals
    "bf16 with ZeRO-0": run(
        "--precision", "bf16", "--zero", "0", place="--zero", reason="bf16 with ZeRO-0", hint="--zero 1"
    ),
    "fp16 with ZeRO-0": run(
        "--precision", "fp16", "--zero", "0", place="--zero", reason="fp16 with ZeRO-0", hint="--zero 1"
    ),
    "offload with ZeRO-0": run(
        "--offload", "cpu", "--zero", "0", place="--offload", reason="only ZeRO's optimizers", hint="--zero 1"
    ),
    "nvme with ZeRO-1": run(
        "--offload", "nvme", place="--offload", reason="with ZeRO-3 only", hint="--zero 3, or --offload cpu"
    ),
    "nvme with stages": run(
        "--offload", "nvme", "--zero", "3", "--pipeline", "2", place="--offload", reason="read back",
        hint="--pipeline 1"
    ),
    "nvme without a folder": run(
        "--offload", "nvme", "--zero", "3", place="--offload", reason="a folder on a local disk", hint="nvme_path="
    ),
    "an attention that is none": run(
        "--set", "attention=spda", place="--set attention", reason="unknown attention implementation",
        hint="did you mean sdpa?"
    ),
    "flash attention on a CPU": run(
        "--set", "attention=flash_attention_2", place="--set attention", reason="CUDA devices only",
        hint="attention=auto"
    ),
    "checkpoints kept of none": run(
        "--save-every", "never", "--keep-every", "5", place="--keep-every", reason="--keep-every can't be combined",
        hint="--save-every 0"
    ),
    "elastic without restarts": run(
        "--elastic", place="--elastic", reason="--elastic requires --restarts N", hint="--restarts N"
    ),
    "freezing what there is not": run(
        "--set", "freeze=[model.layer.*]", place="--set freeze", reason="matches 'model.layer.*'",
        hint="model.norm.weight"
    ),
    "freezing everything": run(
        "--set", "freeze=['*']", place="--set freeze", reason="only frozen parameters", hint="freeze less"
    ),
    # --- places
    "pdsh without a hostfile": run(
        "--launcher", "pdsh", place="--launcher", reason="requires a hostfile", hint="--hostfile FILE"
    ),
    "openmpi without a hostfile": run(
        "--launcher", "openmpi", place="--launcher", reason="requires a hostfile", hint="--hostfile FILE"
    ),
    "nodes without the launcher none": run(
        "--nodes", "2", place="--nodes", reason="nodes is only for --launcher none", hint="--hostfile"
    ),
    "processes without the launcher none": run(
        "--processes", "2", place="--processes", reason="processes is only for --launcher none", hint="--hostfile"
    ),
    "the launcher none with a hostfile": run(
        "--launcher", "none", "--hostfile", "h", "--processes", "2", files=_FOUR,
        place="--hostfile", reason="can't be used with a hostfile", hint="--nodes N",
    ),
    "the launcher none without an address": run(
        "--launcher", "none", "--nodes", "2", "--processes", "2",
        place="--launcher", reason="2 nodes requires --master-addr", hint="set --master-addr",
    ),
    "the launcher none without ranks": run(
        "--launcher", "none", place="--launcher", reason="requires --processes", hint="--processes N"
    ),
    "the launcher none without a name": bare(
        "run", "--launcher", "none", "--processes", "2",
        place="--launcher none", reason="the same run name", hint="--name NAME",
    ),
    "a node's number without the launcher none": run(
        "--node-rank", "0", place="--node-rank", reason="for --launcher none", hint="remove"
    ),
    "a node that there is not": run(
        "--launcher", "none", "--processes", "1", "--node-rank", "3",
        place="--node-rank", reason="no node 3 among 1", hint="--nodes N",
    ),
    "nodes that would stay empty": run(
        "--launcher", "none", "--nodes", "3", "--processes", "2", "--master-addr", "a", "--data-parallel", "2",
        place="--nodes", reason="2 ranks leave 2 of 3 nodes without a rank", hint="fewer --nodes",
    ),
    "slurm without an allocation": run(
        "--launcher", "slurm", place="--launcher", reason="no Slurm allocation", hint="dstrain submit"
    ),
    "slurm with a hostfile": run(
        "--launcher", "slurm", "--hostfile", "h", files=_FOUR, place="--hostfile", reason="in Slurm's order",
        hint="remove"
    ),
    "an allocation without hosts": run(
        environment={"SLURM_JOB_ID": "7"}, place="SLURM_JOB_ID", reason="SLURM_JOB_NODELIST is not",
        hint="sbatch or salloc"
    ),
    "an allocation with tasks in words": run(
        environment={"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_TASKS_PER_NODE": "two"},
        place="SLURM_TASKS_PER_NODE", reason="'two'", hint="unset it",
    ),
    "an allocation of other numbers": run(
        environment={"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_TASKS_PER_NODE": "2(x3)"},
        place="Slurm", reason="lists 1 hosts, but task counts for 3", hint="salloc",
    ),
    "an allocation that Slurm's tool is needed for": run(
        environment={"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "PATH": "/none"},
        place="SLURM_JOB_ID", reason="scontrol is not in PATH", hint="--launcher local",
    ),
    "a device that dstrain does not run on": run(
        environment={"DS_ACCELERATOR": "tpu"}, place="DS_ACCELERATOR", reason="not on 'tpu'", hint="unset it"
    ),
    "GPUs asked for where there are none": run(
        environment={"DS_ACCELERATOR": "cuda", "PATH": "/none"},
        place="DS_ACCELERATOR", reason="none is visible", hint="nvidia-smi",
    ),
    "submit without ranks": bare(
        "submit", place="--gpus-per-node", reason="the number of ranks per node is not set", hint="--tasks-per-node N"
    ),
    "submit with GPUs and tasks": bare(
        "submit", "--gpus-per-node", "4", "--tasks-per-node", "4",
        place="--gpus-per-node", reason="the number of ranks per node is not set", hint="--tasks-per-node N",
    ),
    "submit with a hostfile": bare(
        "submit", "--tasks-per-node", "2", "--hostfile", "h", files=_FOUR,
        place="--hostfile", reason="Slurm chooses the hosts", hint="--nodes N",
    ),
    "submit with another launcher": bare(
        "submit", "--tasks-per-node", "2", "--launcher", "pdsh",
        place="--launcher", reason="with srun", hint="remove --launcher",
    ),
    "submit more than the nodes hold": bare(
        "submit", "--tasks-per-node", "2", "--pipeline", "4",
        place="--pipeline", reason="4 stages", hint="--pipeline",
    ),
    "submit where there is no Slurm": bare(
        "submit", "--tasks-per-node", "2", "--name", "x", environment={"PATH": "/none"},
        place="dstrain submit", reason="sbatch is not in PATH", hint="login node",
    ),
    "submit without GPUs in words": bare(
        "submit", "--gpus-per-node", "all", place="--gpus-per-node", reason="not a valid integer",
        hint="submit --help"
    ),
    "verify: a layout that is none": bare(
        "verify", "--layouts", "zero9", place="--layouts", reason="'zero9'", hint="for example zero2-pp4"
    ),
    "verify: a layout that is refused": bare(
        "verify", "--layouts", "zero0-pp2", "--precision", "bf16",
        place="--layouts", reason="zero0-pp2", hint="--zero 1",
    ),
    "verify: no ranks": bare("verify", "--ranks", "0", place="--ranks", reason="x>=1", hint="verify --help"),
}  # fmt: skip

assert all(isinstance(row, BadInput) for row in LAYOUTS.values())
