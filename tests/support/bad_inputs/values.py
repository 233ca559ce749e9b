"""A bad value of every key of the run config, in a file and as a flag, and keys that there are not."""

from __future__ import annotations

from tests.support.bad_inputs.row import BadInput, config, run

# key, value in YAML, what is wrong, what mends it. Every key of the run config has a row of a wrong type.
_WRONG_TYPES = [
    ("model", "5", "a string", 'quotes: model: "5"'),
    ("init", "zeros", "'random' or 'pretrained'", "initial weights: random"),
    ("freeze", "model.layers.0", "a list", "parameters to freeze"),
    ("tokenizer", "true", "a string", "quotes"),
    ("data", "null", "a string", "text file, folder"),
    ("data_format", "chat", "'auto', 'text', 'messages'", "of the first record"),
    ("data_fields", "content", "a dictionary", "names of the fields"),
    ("chat_template", "[chatml]", "a string", "Jinja template"),
    ("train_on", "user", "'assistant', 'last' or 'all'", "counts in the loss"),
    ("on_bad_record", "ignore", "'error' or 'skip'", "can't be trained on"),
    ("too_long", "truncate", "'error', 'drop' or 'cut'", "more than seq_len tokens"),
    ("attention", "2", "a string", "quotes"),
    ("seq_len", "long", "an integer", "in tokens; for example seq_len: 256"),
    ("pack", "1", "boolean", "for example pack: true"),
    ("begin_token", "maybe", "'auto', 'always' or 'never'", "what documents begin with"),
    ("max_document_bytes", "1GB", "an integer", "bytes of the largest document"),
    ("access", "everybody", "'private', 'group' or 'umask'", "who may read a new run folder"),
    ("validation", "5%", "a number", "fraction of the documents"),
    ("steps", "many", "an integer", "optimizer steps; for example steps: 100"),
    ("global_batch", "32.5", "an integer", "samples per optimizer step"),
    ("micro_batch", "[1]", "an integer", "samples per forward and backward pass"),
    ("seed", "lucky", "an integer", "for example seed: 1234"),
    ("optimizer", "adam", "'adamw' or 'sgd'", "adamw"),
    ("lr", "fast", "a number", "for example lr: 0.0003"),
    ("loss", "mse", "'cross-entropy', or one of your own", "training loss"),
    ("lr_schedule", "exponential", "'cosine', 'linear' or 'constant'", "after warm-up"),
    ("lr_final", "low", "a number", "as a fraction of lr"),
    ("warmup_steps", "10%", "an integer", "steps over which the learning rate rises"),
    ("betas", "0.9", "a list", "betas: [0.9, 0.95]"),
    ("eps", "tiny", "a number", "epsilon"),
    ("momentum", "{a: 1}", "a number", "SGD: momentum"),
    ("weight_decay", "none", "a number", "for example weight_decay: 0.1"),
    ("gradient_clipping", "off", "a number", "0: no clipping"),
    ("zero", "two", "0, 1, 2 or 3", "ZeRO stage"),
    ("pipeline", "1.0", "an integer", "pipeline stages"),
    ("data_parallel", "all", "an integer", "as many as the devices allow"),
    ("partition", "[5, 5]", "a string", "5,5,5,1"),
    ("precision", "fp64", "'fp32', 'bf16' or 'fp16'", "for example precision: fp32"),
    ("schedule", "gpipe", "'1f1b' or 'dualpipev'", "pipeline schedule"),
    ("offload", "true", "'none', 'cpu' or 'nvme'", "for example offload: none"),
    ("nvme_path", "1", "a string", "quotes"),
    ("activation_checkpointing", "yes", "boolean", "for example activation_checkpointing: false"),
    ("deterministic", "maybe", "boolean", "for example deterministic: false"),
    ("hostfile", "[a, b]", "a string", "NAME slots=N"),
    ("name", "123", "a string", 'quotes: name: "123"'),
    ("runs_dir", "{}", "a string", "for example runs_dir: runs"),
    ("eval_every", "often", "an integer", "for example eval_every: 50"),
    ("eval_samples", "0.5", "an integer", "validation samples"),
    ("save_every", "hourly", "such as 20m or 1h30m", "500, 20m, 1h30m"),
    ("time_limit", "90", "a string", 'quotes: time_limit: "90"'),
    ("launcher", "ssh", "'local', 'pdsh'", "how ranks are started"),
    ("nodes", "two", "an integer", "number of nodes"),
    ("processes", "gpu", "an integer", "ranks per node"),
    ("master_addr", "10", "a string", "in quotes"),
    ("master_port", "http", "an integer", "TCP port"),
    ("restarts", "always", "an integer", "for example restarts: 0"),
    ("elastic", "2", "boolean", "for example elastic: false"),
    ("hang_after", "30", "a string", "quotes"),
    ("check_every", "true", "an integer", "for example check_every: 50"),
    ("save_weights", "fp16", "boolean", "for example save_weights: false"),
    ("keep", "all", "an integer", "for example keep: 2"),
    ("keep_every", "1k", "an integer", "0: off"),
    ("background_save", "no", "boolean", "for example background_save: true"),
    ("prompt", "5", "a string", 'quotes: prompt: "5"'),
    ("sample_tokens", "few", "an integer", "for example sample_tokens: 120"),
    ("ds_config", "{bf16: {enabled: true}}", "a string", "DeepSpeed JSON file"),
    ("deepspeed", "zero2.json", "a dictionary", "in dstrain: ds_config: zero2.json"),
    ("trackers", "3", "must be a list: [tensorboard]", "experiment trackers"),
    ("hooks", "3", "must be a list: [my_module:MyHook]", "your own hook classes"),
    ("profile", "3", "a dictionary", "torch.profiler traces"),
    ("code_dirs", "3", "a list", "folders to import"),
    ("data_options", "3", "a dictionary", "keyword arguments of a dataset"),
    ("loss_options", "3", "a dictionary", "keyword arguments of a loss"),
    ("optimizer_options", "3", "a dictionary", "keyword arguments of an optimizer"),
    ("lr_schedule_options", "3", "a dictionary", "keyword arguments of a schedule"),
]
KEYS_WITH_A_WRONG_TYPE = {key for key, *_ in _WRONG_TYPES}

# The type is right, the value can't be.
_WRONG_VALUES = [
    ("steps", "0", "greater than 0", "optimizer steps"),
    ("steps", "-3", "greater than 0", "optimizer steps"),
    ("steps", "true", "an integer", "optimizer steps"),
    ("steps", "'3'", "an integer", "without quotes"),
    ("steps", "3.0", "an integer", "optimizer steps"),
    ("steps", "010", "an integer", "optimizer steps"),
    ("steps", "{a: 3}", "an integer", "optimizer steps"),
    ("steps", "", "an integer", "optimizer steps"),
    ("steps", "9" * 30, "less than or equal to", "optimizer steps"),
    ("seq_len", "-1", "greater than 0", "sequence length of a sample"),
    ("global_batch", "0", "greater than 0", "samples per optimizer step"),
    ("micro_batch", "-8", "greater than 0", "per forward and backward pass"),
    ("seed", "-1", "greater than or equal to 0", "for example seed"),
    ("seed", "1" + "0" * 40, "less than", "for example seed"),
    ("lr", "0", "greater than 0", "peak learning rate"),
    ("lr", "-3e-4", "greater than 0", "peak learning rate"),
    ("lr", ".inf", "finite", "peak learning rate"),
    ("lr", ".nan", "finite", "peak learning rate"),
    ("lr", "1e999", "finite", "peak learning rate"),
    ("lr", "'3e-4'", "a number", "without quotes"),
    ("lr", "true", "a number", "peak learning rate"),
    ("lr_final", "1.5", "less than or equal to 1", "fraction of lr"),
    ("validation", "1.0", "less than 1", "fraction of the documents"),
    ("validation", "-0.1", "greater than or equal to 0", "fraction of the documents"),
    ("betas", "[0.9]", "2 items", "betas: [0.9, 0.95]"),
    ("betas", "[0.9, 0.95, 0.99]", "2 items", "betas: [0.9, 0.95]"),
    ("betas", "[0.9, 1.5]", "less than 1", "betas: [0.9, 0.95]"),
    ("betas", "[0.9, high]", "a number", "betas: [0.9, 0.95]"),
    ("eps", "0", "greater than 0", "epsilon"),
    ("momentum", "1.0", "less than 1", "SGD: momentum"),
    ("weight_decay", "-0.1", "greater than or equal to 0", "weight_decay"),
    ("gradient_clipping", "-1", "greater than or equal to 0", "0: no clipping"),
    ("zero", "4", "0, 1, 2 or 3", "ZeRO stage"),
    ("zero", "true", "0, 1, 2 or 3", "ZeRO stage"),
    ("zero", "1.0", "0, 1, 2 or 3", "ZeRO stage"),
    ("zero", "'1'", "0, 1, 2 or 3", "without quotes"),
    ("pipeline", "0", "greater than 0", "pipeline stages"),
    ("data_parallel", "-2", "greater than 0", "replicas"),
    ("precision", "BF16", "'fp32', 'bf16' or 'fp16'", "precision"),
    ("save_every", "-5", "0 or more", "500, 20m, 1h30m"),
    ("save_every", "'500'", "0 or more", "without quotes"),
    ("time_limit", "soon", "not a duration", "90s, 20m, 3h50m"),
    ("time_limit", "0s", "not a duration", "90s, 20m, 3h50m"),
    ("hang_after", "-5m", "not a duration", "90s, 20m"),
    ("nodes", "0", "greater than 0", "number of nodes"),
    ("master_addr", "-oProxyCommand=x", "a host name", "name or address"),
    ("master_port", "70000", "less than or equal to 65535", "TCP port"),
    ("restarts", "-1", "greater than or equal to 0", "maximum restarts"),
    ("keep", "0", "greater than 0", "newest checkpoints"),
    ("freeze", "[1, 2]", "a string", "parameters to freeze"),
    ("deepspeed", "[a]", "a dictionary", "DeepSpeed keys"),
    ("deepspeed", "{a: .nan}", "JSON", "DeepSpeed keys"),
    ("deepspeed", "{a: !!binary aGk=}", "JSON", "DeepSpeed keys"),
    ("deepspeed", "{a: !!set {b, c}}", "JSON", "DeepSpeed keys"),
]

# An unknown key, and what is meant.
_UNKNOWN = [
    ("stpes", "did you mean steps?"),
    ("Steps", "did you mean steps?"),
    ("seq-len", "did you mean seq_len?"),
    ("learning_rte", "in dstrain: lr: 3"),
    ("learning_rate", "in dstrain: lr: 3"),
    ("max_steps", "in dstrain: steps: 3"),
    ("batch_size", "global_batch is the number of samples per step"),
    ("gradient_accumulation_steps", "follows from global_batch"),
    ("train_batch_size", "in dstrain: global_batch: 3"),
    ("zero_stage", "in dstrain: zero: 3"),
    ("zero_optimization", "--set deepspeed.zero_optimization..."),
    ("fp16", "in dstrain: precision: fp16"),
    ("wall_clock_breakdown", "under `deepspeed:`"),
    ("xyzzy", "the keys are: model, init"),
    ('"a\\nb"', "the keys are"),
    ('""', "the keys are"),
]


def _rows() -> dict[str, BadInput]:
    rows = {}
    for key, value, reason, hint in [*_WRONG_TYPES, *_WRONG_VALUES]:
        shown = value if len(value) < 25 else f"{len(value)} characters"
        rows[f"{key}: {shown}"] = config(f"# mine\n{key}: {value}\n", 2, reason, hint)
    for key, hint in _UNKNOWN:
        rows[f"unknown key {key}"] = config(f"lr: 0.1\n\n{key}: 3\n", 3, "unknown key", hint)
    return rows


# Flags: those that click checks itself, and those that the config does.
_FLAGS = [
    ("--zero", "4", "0<=x<=3", "dstrain run --help"),
    ("--zero", "two", "'two' is not a valid", "dstrain run --help"),
    ("--zero", "", "'' is not a valid", "dstrain run --help"),
    ("--pipeline", "0", "x>=1", "dstrain run --help"),
    ("--pipeline", "2.0", "'2.0' is not a valid", "dstrain run --help"),
    ("--data-parallel", "-1", "x>=1", "dstrain run --help"),
    ("--partition", "middle", "unknown partition", "auto, parameters, uniform"),
    ("--precision", "fp8", "'fp8' is not one of", "'bf16'"),
    ("--schedule", "gpipe", "'gpipe' is not one of", "'dualpipev'"),
    ("--offload", "gpu", "'gpu' is not one of", "'nvme'"),
    ("--micro-batch", "0", "x>=1", "dstrain run --help"),
    ("--global-batch", "1e3", "'1e3' is not a valid", "dstrain run --help"),
    ("--seq-len", "-32", "x>=1", "dstrain run --help"),
    ("--steps", "0", "x>=1", "dstrain run --help"),
    ("--lr", "high", "'high' is not a valid", "dstrain run --help"),
    ("--lr", "0", "greater than 0", "peak learning rate"),
    ("--lr", "inf", "finite", "peak learning rate"),
    ("--lr", "nan", "finite", "peak learning rate"),
    ("--seed", "-1", "x>=0", "dstrain run --help"),
    ("--init", "zeros", "'zeros' is not one of", "'pretrained'"),
    ("--save-every", "hourly", "such as 20m or 1h30m", "500, 20m, 1h30m"),
    ("--save-every", "-5", "0 or more", "500, 20m, 1h30m"),
    ("--keep", "0", "x>=1", "dstrain run --help"),
    ("--keep-every", "-1", "x>=0", "dstrain run --help"),
    ("--launcher", "ssh", "'ssh' is not one of", "'local', 'pdsh'"),
    ("--nodes", "0", "x>=1", "dstrain run --help"),
    ("--processes", "0", "x>=1", "dstrain run --help"),
    ("--master-addr", "a;b", "a host name", "name or address"),
    ("--master-port", "0", "1<=x<=65535", "dstrain run --help"),
    ("--master-port", "65536", "1<=x<=65535", "dstrain run --help"),
    ("--restarts", "-1", "x>=0", "dstrain run --help"),
    ("--time-limit", "tomorrow", "not a duration", "90s, 20m, 3h50m"),
    ("--node-rank", "-1", "x>=0", "dstrain run --help"),
    ("--steps", "9" * 30, "less than or equal to", "optimizer steps"),
]

VALUES = {
    **_rows(),
    **{
        f"{flag} {value[:20]}": run(flag, value, place=flag, reason=reason, hint=hint)
        for flag, value, reason, hint in _FLAGS
    },
    # --set
    "--set without =": run("--set", "lr", place="--set", reason="KEY=VALUE", hint="--set lr=1e-3"),
    "--set without a key": run("--set", "=3", place="--set", reason="KEY=VALUE", hint="--set lr=1e-3"),
    "--set empty": run("--set", "", place="--set", reason="KEY=VALUE", hint="--set lr=1e-3"),
    "--set an unknown key": run(
        "--set", "stpes=3", place="--set stpes", reason="'stpes'", hint="did you mean steps?"
    ),
    "--set with a space": run(
        "--set", "steps = 3", place="--set steps", reason="'steps '", hint="did you mean steps?"
    ),
    "--set a wrong type": run(
        "--set", "steps=many", place="--set steps", reason="an integer", hint="for example steps: 100"
    ),
    "--set into what has no parts": run(
        "--set", "steps.a=1", place="--set steps.a", reason="an integer", hint="optimizer steps"
    ),
    "--set DeepSpeed's key at top": run(
        "--set", "zero_optimization.stage=2", place="--set zero_optimization.stage",
        reason="unknown key 'zero_optimization'", hint="--set deepspeed.zero_optimization",
    ),
    "--set a number of 5,000 digits": run(
        "--set", f"steps={'9' * 5000}", place="--set steps", reason="an integer", hint="optimizer steps"
    ),
    "--set brackets in brackets": run(
        "--set", f"betas={'[' * 5000}", place="--set betas", reason="a list", hint="betas: [0.9, 0.95]"
    ),
    "--set nothing": run("--set", "steps=", place="--set steps", reason="an integer", hint="optimizer steps"),
    "--set with a dot at the end": run(
        "--set", "deepspeed.=1", place="--set deepspeed.", reason="no key ''", hint="keys"
    ),
}  # fmt: skip
