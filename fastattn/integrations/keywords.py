"""Keyword arguments that transformers' models hand on to attention: which may be passed over, and which change the result."""

# Keyword arguments that models hand on to attention, but that say nothing that is not in query, key, value and the mask by then,
# or that are about another part of the model: none of transformers' own attention functions for dense tensors reads one.
HARMLESS = frozenset({
    # the loss, by Trainer, data collators and users
    "auxiliary_logits", "auxiliary_loss_weight", "ignore_index", "labels", "num_items_in_batch", "reduction", "shift_labels",
    "sigma", "zero_infinity",
    # what the model returns
    "debug_io", "debug_io_dir", "logits_indices", "logits_processor_args", "logits_to_keep", "output_attention_mask",
    "output_hidden_states", "output_router_logits", "prune_layers", "return_dict", "return_shared_kv_states",
    # embeddings before the first layer, and the rotations of query and key
    "bool_masked_pos", "input_ids", "inputs_embeds", "interpolate_pos_encoding", "mm_token_type_ids", "position_embeddings",
    "position_ids", "special_tokens_mask", "token_type_ids",
    # images, and how they join a text
    "image_sizes", "mm_encoder_outputs", "vision_aspect_ratio", "vision_feature_layer", "vision_feature_select_strategy",
    # caches: key and value hold what is in them by now
    "cache_params", "cache_position", "past_key_values", "use_cache",
    # how other kernels work, not what they compute
    "deterministic", "kernel_options",
})  # fmt: skip
# Keyword arguments that change the result. None and False ask for nothing.
NOT_SERVED = {
    # beside the scores
    "softcap": "a soft cap on the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "head_mask": "a factor per head",
    "layer_head_mask": "a factor per head",
    # which keys a query sees
    "indices": "a choice of keys per query",
    "block_indices": "a choice of key blocks per query",
    "seq_idx": "sequences packed end to end without their offsets or a mask (B, 1, M, N)",
    # keys and values that lie elsewhere
    "cache": "a paged cache",
    "block_table": "a paged cache",
    "read_index": "a paged cache",
    "write_index": "a paged cache",
    # the weights
    "output_attentions": "weights that it never forms",
    "output_cross_attentions": "weights that it never forms",
    "output_encoder_attentions": "weights that it never forms",
    "output_global_attentions": "weights that it never forms",
    "output_mask_decoder_attentions": "weights that it never forms",
}
