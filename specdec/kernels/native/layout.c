/* How this library lays out what __init__.py describes too: a field that one of them forgets or moves is found at load,
 * not in somebody's memory. */
#include "common.h"

#define SIZE(type) {#type, 0, sizeof(type)}
#define FIELD(type, field) {#type "." #field, offsetof(type, field), sizeof(((type *)0)->field)}
#define FIELDS_2(type, a, b) FIELD(type, a), FIELD(type, b)
#define FIELDS_3(type, a, b, c) FIELDS_2(type, a, b), FIELD(type, c)
#define FIELDS_4(type, a, b, c, d) FIELDS_2(type, a, b), FIELDS_2(type, c, d)
#define FIELDS_5(type, a, b, c, d, e) FIELDS_3(type, a, b, c), FIELDS_2(type, d, e)
#define FIELDS_6(type, a, b, c, d, e, f) FIELDS_3(type, a, b, c), FIELDS_3(type, d, e, f)
#define FIELDS_7(type, a, b, c, d, e, f, g) FIELDS_3(type, a, b, c), FIELDS_4(type, d, e, f, g)

static const struct {
    const char *name;
    int64_t offset, size;
} layout[] = {
    SIZE(Matrix),
    FIELDS_6(Matrix, data, scale, bias, n, k, bits),
    SIZE(Layer),
    FIELDS_7(Layer, q, k, v, o, gate, up, down),
    FIELDS_4(Layer, input_norm, post_norm, q_norm, k_norm),
    FIELDS_6(Layer, input_eps, post_eps, head_eps, num_heads, num_kv_heads, head_dim),
    SIZE(Attention),
    FIELDS_6(Attention, B, T, S, H, K, D),
    FIELDS_6(Attention, q, k, v, k_strides, v_strides, pages),
    FIELDS_7(Attention, mask, mask_is_bool, mask_strides, scale, out, scores, padded_keys),
    SIZE(PackedForward),
    FIELDS_6(PackedForward, layers, num_layers, rows, x, cos, sin),
    FIELDS_3(PackedForward, attentions, count, places),
    FIELDS_6(PackedForward, q, k, v, hidden, out, kept),
    SIZE(StackForward),
    FIELDS_3(StackForward, layers, num_layers, q_apart),
    FIELDS_3(StackForward, x, cos, sin),
    FIELDS_4(StackForward, attention, keys, values, firsts),
    FIELDS_5(StackForward, q, k, v, hidden, out),
    SIZE(HeadForward),
    FIELDS_4(HeadForward, layers, first, embeddings, num_embeddings),
    FIELDS_5(HeadForward, tokens, positions, states, cos, sin),
    SIZE(HeadLogits),
    FIELDS_7(HeadLogits, last, lm_head, norm, eps, x, rows, logits),
    {"page_slots", 0, PAGE_SLOTS},
    SIZE(Candidates),
    FIELDS_5(Candidates, x, vocab, peaks, shares, norms),
    SIZE(Taken),
    FIELDS_3(Taken, tokens, counts, room),
    SIZE(Visibility),
    FIELDS_5(Visibility, num_rows, num_new, num_tail, num_slots, prompt_size),
    FIELDS_5(Visibility, seen, seen_strides, lengths, prompt, out),
    SIZE(Verification),
    FIELDS_7(Verification, num_slots, size, depth, vocab, p, q, tokens),
    FIELDS_5(Verification, parents, coins, path, count, next),
    FIELDS_4(Verification, first_child, next_sibling, scratch, rows),
    {"num_blocks", 0, PADDED_BLOCKS(1 << 20)},
};

/* The name of entry i, "Structure" or "Structure.field", and its offset and size; NULL after the last. */
__attribute__((visibility("default"))) const char *specdec_layout(int64_t i, int64_t *offset_and_size) {
    if (i < 0 || i >= (int64_t)(sizeof layout / sizeof *layout)) return NULL;
    offset_and_size[0] = layout[i].offset, offset_and_size[1] = layout[i].size;
    return layout[i].name;
}
