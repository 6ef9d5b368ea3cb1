//! Keys of Hugging Face's trainer and of LLaMA-Factory that this program does not have: what to
//! write instead, or that there is nothing.

/// Keys whose meaning is here under another name or in another section.
const ELSEWHERE: &[(&str, &str)] = &[
    ("model_name_or_path", "write `model: DIR` at the top level"),
    ("adapter_name_or_path", "write `adapter: {kind: saved, path: DIR}`"),
    ("finetuning_type", "write `adapter: {kind: ..}`"),
    ("lora_rank", "write `adapter: {kind: lora, rank: ..}`"),
    ("lora_alpha", "write `adapter: {kind: lora, alpha: ..}`"),
    ("lora_target", "write `adapter: {targets: ..}`"),
    ("dataset", "write `data: {train: [{path: FILE}]}`"),
    ("val_size", "write `data: {validation: {fraction: ..}}`"),
    ("moe_dropout", "write `train: {lora_dropout: ..}`"),
    ("early_stopping_steps", "write `early_stopping_patience`"),
    ("neat_packing", "write `packing: true`: packed samples never see each other here"),
    ("disable_gradient_checkpointing", "write `gradient_checkpointing`"),
    ("per_device_train_batch_tokens", "write `packing: true` and `data.cutoff_len`"),
];

/// Keys that have no counterpart.
const ABSENT: &[(&str, &str)] = &[
    ("neftune_noise_alpha", "noise on embeddings (NEFTune) is not offered; remove it"),
    ("fp16", "f16 arithmetic is not offered; `bf16: true` halves the weights' memory"),
    ("pure_bf16", "adapters are always trained in f32; `bf16: true` rounds frozen weights"),
    ("tf32", "arithmetic is f32; remove it"),
    ("optim", "the optimizer is AdamW; remove it"),
    ("optim_args", "the optimizer is AdamW with the adam_ keys; remove it"),
    ("use_galore", "GaLore is not offered; remove it"),
    ("use_badam", "BAdam is not offered; remove it"),
    ("use_dora", "DoRA is not offered; remove it"),
    ("pissa_init", "PiSSA is not offered; remove it"),
    ("loraplus_lr_ratio", "LoRA+ is not offered; remove it"),
    ("quantization_bit", "quantised weights are not offered; remove it"),
    ("quantization_method", "quantised weights are not offered; remove it"),
    ("load_in_4bit", "quantised weights are not offered; remove it"),
    ("load_in_8bit", "quantised weights are not offered; remove it"),
    ("deepspeed", "training on several machines is not offered; remove it"),
    ("fsdp", "training on several machines is not offered; remove it"),
    ("flash_attn", "attention never holds whole score matrices; remove it"),
    ("use_unsloth", "there is nothing to switch on; remove it"),
    ("enable_liger_kernel", "there is nothing to switch on; remove it"),
    ("shift_attn", "shifted attention (LongLoRA) is not offered; remove it"),
    ("rope_scaling", "positions are as config.json of the model says; remove it"),
    ("mixture_of_depths", "mixture of depths is not offered; remove it"),
    ("dataloader_num_workers", "samples are read before training begins; remove it"),
    ("per_device_eval_batch_size", "evaluation chooses its own batches; remove it"),
    ("ddp_timeout", "there is one process; remove it"),
    ("resume_from_checkpoint", "write `smore train --resume` on the command line; remove it"),
    ("save_only_model", "checkpoints always hold what it takes to go on; remove it"),
    ("logging_steps", "every step is logged; remove it"),
    ("plot_loss", "report.html always has the curves; remove it"),
    ("overwrite_output_dir", "an earlier run is moved aside, never overwritten; remove it"),
    ("group_by_modality_length", "there is only text; remove it"),
    ("auto_find_batch_size", "batches are as given; remove it"),
    ("torch_compile", "there is nothing to compile; remove it"),
];

/// What to say about a key that is known elsewhere and unknown here.
pub(crate) fn advice(key: &str) -> Option<&'static str> {
    let tables = ELSEWHERE.iter().chain(ABSENT);
    tables.into_iter().find(|(known, _)| *known == key).map(|(_, advice)| *advice)
}
