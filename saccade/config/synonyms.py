"""Names that users bring along: other programs' names of our knobs, and knobs that are refused."""

from __future__ import annotations

SYNONYMS = {
    "output_dir": "default_local_dir save_path save_dir checkpoint_dir",
    "steps": "max_steps num_steps total_training_steps training_steps train_steps num_episodes",
    "steps (epochs x rows / learner.prompts_per_step)": "num_train_epochs num_epochs total_epochs epochs max_epochs",
    "seed": "data_seed random_seed",
    "model.path": "model_name_or_path model_name model_path pretrain base_model policy_model",
    "model.dtype": "torch_dtype precision bf16 fp16 param_dtype model_dtype",
    "model.lora.rank": "lora_r r use_peft use_lora",
    "model.lora.targets": "target_modules lora_target_modules",
    "model.max_image_tokens": "max_pixels min_pixels image_max_pixels max_image_size image_resolution image_tokens "
    "max_dynamic_patch max_patches max_num_tiles limit_image_tokens mm_processor_kwargs",
    "model.path (its folder has chat_template.jinja)": "chat_template custom_chat_template chat_template_path",
    "model.freeze": "freeze_vision_tower freeze_vision_modules freeze_parameters freeze_vision freeze_prefix",
    "model.lora.quantize": "load_in_4bit qlora quantization",
    "data.train": "train_files train_file train_dataset dataset dataset_name prompt_data train_data",
    "data.eval": "val_files val_file eval_dataset eval_files test_files eval_data val_data validation",
    "data.columns.prompt": "prompt_key input_key problem_key prompt_column question_column",
    "data.columns.image": "image_key images_key image_column image_field",
    "data.columns.answer": "answer_key label_key answer_column solution_column ground_truth_key",
    "data.media_from": "image_dir image_folder image_root media_dir",
    "data.max_prompt_length": "max_prompt_len prompt_max_len max_input_length prompt_length",
    "data.overlong_prompts": "filter_overlong_prompts truncation",
    "rollout.engines": "vllm_num_engines num_engines rollout_num_engines",
    "rollout.engine_options.tensor_parallel_size": "tensor_model_parallel_size vllm_tensor_parallel_size tp tp_size",
    "rollout.num_generations": "n n_samples_per_prompt group_size num_samples num_samples_per_prompt rollout_n k",
    "rollout.max_completion_length": "max_tokens max_new_tokens response_length max_response_length generate_max_len "
    "max_completion_len max_gen_len",
    "rollout.engine_options.gpu_memory_utilization": "vllm_gpu_memory_utilization vllm_gpu_memory_util "
    "gpu_memory_utilization",
    "rollout.engine_options.max_num_seqs": "max_num_seqs",
    "rollout.max_staleness": "max_async_level async_level max_head_offpolicyness off_policy_steps staleness",
    "rollout.engine_options": "vllm_kwargs engine_kwargs vllm_options",
    "data.max_prompt_length + rollout.max_completion_length": "max_model_len max_seq_len max_seq_length max_length "
    "vllm_max_model_length",
    "reward.functions": "reward_funcs reward_function reward_functions custom_reward_function rewards",
    "reward.functions (each has a weight)": "reward_weights",
    "algorithm.advantage": "adv_estimator advantage_estimator scale_rewards norm_adv_by_std_in_grpo",
    "algorithm.loss": "loss_type policy_loss loss_mode importance_sampling_level",
    "algorithm.loss.low": "epsilon cliprange clip_ratio clip_ratio_low eps_clip clip_range clip_eps",
    "algorithm.loss.high": "epsilon_high clip_ratio_high eps_clip_high",
    "algorithm.loss.dual": "delta clip_ratio_c dual_clip",
    "algorithm.aggregation": "loss_agg_mode token_level_loss loss_aggregation",
    "algorithm.kl.weight": "beta kl_coef kl_loss_coef init_kl_coef kl_beta kl_penalty_coef",
    "algorithm.kl.estimator": "kl_loss_type kl_penalty kl_type",
    "algorithm.kl.where": "use_kl_in_reward use_kl_loss",
    "algorithm.kl.refresh": "sync_ref_model ref_model_sync_steps ref_update_steps",
    "algorithm.off_policy": "importance_sampling_correction vllm_importance_sampling_correction tis_imp_ratio_cap",
    "algorithm.entropy_bonus": "entropy_coef entropy_coeff",
    "algorithm.optimizer_steps": "ppo_mini_batch_size mini_batch_size num_iterations ppo_epochs num_minibatches",
    "algorithm.refill": "dynamic_sampling filter_groups dynamic_filtering",
    "algorithm.overlong": "overlong_buffer_len soft_punish_cache overlong_penalty mask_truncated_completions "
    "overlong_filtering",
    "learner.ranks": "num_gpus n_gpus_per_node nproc_per_node num_processes world_size actor_num_gpus_per_node",
    "learner.prompts_per_step": "batch_size train_batch_size global_batch_size rollout_batch_size "
    "per_device_train_batch_size generation_batch_size",
    "learner.micro_batch": "gradient_accumulation_steps micro_batch_size micro_train_batch_size "
    "ppo_micro_batch_size ppo_micro_batch_size_per_gpu ppo_max_token_len_per_gpu max_tokens_per_gpu",
    "learner.learning_rate": "lr actor_learning_rate actor_lr",
    "learner.lr_schedule": "lr_scheduler_type lr_scheduler scheduler warmup_style",
    "learner.warmup_steps": "warmup_ratio num_warmup_steps lr_warmup_steps lr_warmup_ratio lr_warmup_steps_ratio",
    "learner.lr_schedule.min_ratio": "min_lr lr_min",
    "learner.betas": "adam_beta1 adam_beta2 adam_betas",
    "learner.max_grad_norm": "grad_clip clip_grad max_norm gradient_clipping grad_norm",
    "learner.weight_decay": "wd l2",
    "learner.offload (none, optimizer or parameters)": "offload_optimizer offload_parameters cpu_offload param_offload "
    "optimizer_offload adam_offload",
    "learner.zero_stage": "deepspeed deepspeed_stage zero",
    "evaluation.every": "eval_steps test_freq eval_interval eval_every val_freq",
    "evaluation.temperature": "val_temperature eval_temperature",
    "checkpoint.every": "save_steps save_freq save_interval save_every checkpoint_interval",
    "checkpoint.keep": "save_total_limit max_ckpt_num max_actor_ckpt_to_keep",
    "cluster.resources": "num_cpus cpus",
    "cluster.resources.<role>.CPU (as many threads)": "threads num_threads omp_num_threads",
    "cluster.device": "use_cpu no_cuda",
    "cluster.timeout": "ddp_timeout timeout_seconds",
}
"""Name here -> names in TRL, verl, OpenRLHF, prime-rl and similar programs."""

VALUES = {
    theirs: ours
    for ours, names in {
        "cuda": "gpu",
        "bfloat16": "bf16",
        "float32": "fp32 float no",
        "nf4": "4bit int4 qlora bnb",
        "ppo_clip": "ppo vanilla clip",
        "sequence": "seq-mean-token-mean seq_mean",
        "token": "token-mean token_mean",
        "constant": "seq-mean-token-sum-norm",
        "k1": "kl",
        "k2": "mse",
        "k3": "low_var_kl",
        "reinforce_pp": "reinforce++ reinforce_plus_plus",
    }.items()
    for theirs in names.split()
}
"""Name of a value in other programs -> its name here."""

REFUSED = {
    f"rollout.{name}": "the learner cannot reproduce a filtered distribution, so training samples with temperature only"
    for name in ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
}

_BY_NAME = {theirs: ours for ours, names in SYNONYMS.items() for theirs in names.split()}


def synonym_of(name: str) -> str | None:
    """Our name of what another program calls `name`."""
    return _BY_NAME.get(name.lower())
