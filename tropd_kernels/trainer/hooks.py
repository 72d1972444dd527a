"""Which of TRL's private methods and attributes the trainer relies on.

A test holds both lists against the TRL that is installed.
"""

#: Methods of DistillationTrainer that are overridden or called, with their leading parameters.
HOOKS = (
    ("_compute_loss", "self unwrapped_student inputs num_items_in_batch"),
    ("_generate", "self prompts"),
    ("_generate_and_score_completions", "self inputs"),
    ("_generate_single_turn", "self prompt_ids images multimodal_fields has_tool_images"),
    ("_get_output_dir", "self trial"),
    (
        "_get_last_hidden_state",
        "self unwrapped_model input_ids attention_mask logits_to_keep pixel_values image_grid_thw "
        "pixel_attention_mask spatial_shapes image_sizes token_type_ids mm_token_type_ids "
        "image_position_ids",
    ),
    ("_get_train_sampler", "self dataset"),
    ("_issue_warnings_after_load", "self load_result"),
    ("_load_best_model", "self"),
    ("_load_from_checkpoint", "self resume_from_checkpoint model"),
    ("_load_optimizer_and_scheduler", "self checkpoint"),
    ("_prepare_inputs", "self generation_batch"),
    ("_save_checkpoint", "self model trial"),
    ("_set_signature_columns_if_needed", "self"),
    ("_tokenize_prompts", "self prompts"),
    (
        "_tool_call_loop",
        "self prompts prompt_ids completion_ids completions images multimodal_fields",
    ),
    ("compute_loss", "self model inputs return_outputs num_items_in_batch"),
    ("training_step", "self model inputs num_items_in_batch"),
)
#: Methods of GRPOTrainer that `verifier.py` calls or overrides.
GRPO_HOOKS = (
    ("_calculate_rewards", "self inputs prompts completions completion_ids_list"),
    ("_log_completion_extra", "self column values"),
    ("_log_metric", "self name value"),
)
#: Attributes of an instance.
ATTRIBUTES = (
    "_buffered_inputs", "_forward_redirection", "_is_vlm", "_metrics", "_signature_columns",
    "_step", "_tokenizer", "_train_batch_size", "chat_template", "chat_template_kwargs",
    "eos_token_ids", "generation_config", "model_wrapped", "pad_to_multiple_of",
    "shuffle_dataset", "teacher_model", "use_vllm",
)  # fmt: skip
#: The processor's fields that TRL's loss reads in a batch with images.
MULTIMODAL_FIELDS = tuple(dict(HOOKS)["_get_last_hidden_state"].split()[5:])
