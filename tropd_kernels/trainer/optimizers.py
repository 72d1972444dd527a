"""Which settings the optimizers of transformers take, by the names of `optim`. DeepSpeed's own have
other rules."""

_GALORE = {
    f"galore_{kind}{layerwise}"
    for kind in ("adamw", "adamw_8bit", "adafactor")
    for layerwise in ("", "_layerwise")
}
#: They take no adam_beta1, adam_beta2 and adam_epsilon.
NOT_ADAM = _GALORE | {
    "adafactor", "sgd", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit", "lomo", "adalomo", "grokadamw", "schedule_free_sgd",
}  # fmt: skip
#: They take the betas, and no epsilon.
LION = {"lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"}
#: They read nothing of optim_args.
NO_OPTIM_ARGS = LION | {
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor",
    "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "lomo", "adalomo",
}  # fmt: skip
#: They have a warm-up of their own, whatever the schedule.
WARM_BY_THEMSELVES = {"schedule_free_adamw", "schedule_free_sgd"}
