/* The native half of specdec.kernels: what a forward of a few tokens costs beside memory traffic, made small.
 *
 * Plain C on pointers, for x86-64 with AVX2 (better: AVX-VNNI; AVX-512 VNNI; AMX) and 64-bit ARM (better with dot
 * products, best with i8mm): no torch headers, so any C compiler builds it in seconds. Python (__init__.py) owns all tensors and checks all shapes; without this library torch does the work.
 * Reading order: common.h, rows.h, product.h, attention.h, tiles.h, layer.h, pool.c; draws.h; simd_*.h as needed.
 *
 * What needs memory returns OUT_OF_MEMORY where there is none, and the next call works. */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "common.h"

#define EXPORT __attribute__((visibility("default")))

static const Kernels *kernels;

/* One call that works with scratch memory: returns 0, or OUT_OF_MEMORY from wherever take() found none. */
#define CALL(num_threads, work)      \
    begin_call(num_threads);         \
    if (_setjmp(memory_ran_out)) {   \
        end_call();                  \
        return OUT_OF_MEMORY;        \
    }                                \
    kernels->work;                   \
    end_call();                      \
    return 0

/* The n-th request for memory from now on fails, once (n counts from 0; negative: none does): for tests. */
EXPORT void specdec_fail_allocation_after(int64_t n) { fail_allocation_after(n); }

/* Whether calls use all threads that they ask for even where others want the cores: for tests. */
EXPORT void specdec_use_all_threads(int is_on) { use_all_threads(is_on); }

/* Chooses an instruction set by name, or the best one for NULL. Returns its name, NULL if there is none. */
EXPORT const char *specdec_select(const char *name) {
    const Kernels *best = best_kernels(name);
    if (best) kernels = best;
    return best ? best->name : NULL;
}

/* Of n outputs and k inputs, padded. */
EXPORT int64_t specdec_packed_bytes(int64_t n, int64_t k, int64_t bits) {
    const int64_t blocks = (n + STRIP - 1) / STRIP * STRIP / 16, groups = (k + GROUP - 1) / GROUP;
    return blocks * groups * group_bytes(bits);
}

static void use_huge_pages(int8_t *packed, int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 1 << 21, begin = (uintptr_t)packed, end = begin + (uintptr_t)bytes;
    const uintptr_t first = (begin + page - 1) & ~(page - 1), last = end & ~(page - 1);
    if (last > first) madvise((void *)first, last - first, MADV_HUGEPAGE); /* advice: failure costs only speed */
#else
    (void)packed, (void)bytes;
#endif
}

/* Of packed weights that are made of a GGUF file's blocks of a type; 0 for types that are not known. */
EXPORT int64_t specdec_bits_of(int64_t type) {
    switch (type) {
        case Q4_0: case Q4_1: case Q4_K: return 4;
        case Q5_0: case Q5_1: case Q5_K: return BYTES5;
        case Q6_K: return BYTES6;
        case Q8_0: return BYTES8;
        default: return 0;
    }
}

/* w [n][k] -> packed weights of 8 or 4 bits (layouts in product.h). Of 8: one scale per output, w ~ scale * q, q in
 * -127..127. Of 4: all is in `packed`, and `scale` is NULL. */
EXPORT int64_t specdec_pack(const float *w, int64_t n, int64_t k, int64_t bits, int8_t *packed, float *scale,
                            int num_threads) {
    use_huge_pages(packed, specdec_packed_bytes(n, k, bits));
    CALL(num_threads, pack(w, n, k, bits, packed, scale));
}

/* The weights of n outputs in a GGUF file's blocks of a type -> packed ones of the bits that specdec_bits_of gives.
 * Output i is row rows[i] of the blocks, or row i where `rows` is NULL. `too_large` counts scales beyond 16-bit floats. */
EXPORT int64_t specdec_repack(int64_t type, const uint8_t *blocks, const int64_t *rows, int64_t n, int64_t k,
                              int8_t *packed, int64_t *too_large, int num_threads) {
    use_huge_pages(packed, specdec_packed_bytes(n, k, specdec_bits_of(type)));
    CALL(num_threads, repack(type, blocks, rows, n, k, packed, too_large));
}

EXPORT int64_t specdec_linear(const Matrix *w, const float *x, int64_t rows, int weight_only, float *out,
                              int num_threads) {
    CALL(num_threads, linear(w, x, rows, weight_only, out));
}

EXPORT int64_t specdec_attend(Attention *a, int num_threads) {
    CALL(num_threads, attend(a));
}

EXPORT int64_t specdec_attention_inputs(const Layer *l, const float *x, int64_t rows, const float *cos, const float *sin,
                                     float *q, float *k, float *v, int num_threads) {
    CALL(num_threads, attention_inputs(l, x, rows, cos, sin, q, k, v));
}

EXPORT int64_t specdec_attention_and_mlp(const Layer *l, Attention *a, const float *x, float *out, int num_threads) {
    CALL(num_threads, attention_and_mlp(l, a, x, out));
}

static int64_t packed_layer(const PackedForward *f, int64_t layer, const float *x, float *out, int num_threads) {
    CALL(num_threads, packed_layer(f, layer, x, out));
}

/* All layers, one call for each: scratch memory is that of one. */
EXPORT int64_t specdec_packed_forward(const PackedForward *f, int num_threads) {
    const float *x = f->x;
    const size_t bytes = (size_t)(f->rows * f->layers->o.n) * sizeof(float);
    for (int64_t layer = 0; layer < f->num_layers; layer++) {
        float *out = (f->num_layers - layer) % 2 ? f->out : f->hidden;
        if (packed_layer(f, layer, x, out, num_threads)) return OUT_OF_MEMORY;
        if (f->kept[layer]) memcpy(f->kept[layer], out, bytes);
        x = out;
    }
    return 0;
}

static int64_t stack_layer(const StackForward *f, int64_t layer, const float *x, float *out, int num_threads) {
    CALL(num_threads, stack_layer(f, layer, x, out));
}

/* The same for rows of a cache. */
EXPORT int64_t specdec_stack_forward(const StackForward *f, int num_threads) {
    const float *x = f->x;
    for (int64_t layer = 0; layer < f->num_layers; layer++) {
        float *out = (f->num_layers - layer) % 2 ? f->out : f->hidden;
        if (stack_layer(f, layer, x, out, num_threads)) return OUT_OF_MEMORY;
        x = out;
    }
    return 0;
}

static int64_t head_inputs(const HeadForward *f, int num_threads) {
    CALL(num_threads, head_inputs(f));
}

/* A draft head's layers, and what is before them. */
EXPORT int64_t specdec_head_forward(const HeadForward *f, int num_threads) {
    if (head_inputs(f, num_threads)) return OUT_OF_MEMORY;
    return specdec_stack_forward(&f->layers, num_threads);
}

/* What is after them. */
EXPORT int64_t specdec_head_logits(const HeadLogits *f, int num_threads) {
    CALL(num_threads, head_logits(f));
}

/* Takes `count` tokens from each of some rows of scores: the next likeliest, or drawn if there are coins. */
EXPORT int64_t specdec_take(const Candidates *u, const int64_t *slots, int64_t num_slots, const Taken *taken, int64_t count,
                         const double *coins, int64_t *tokens, double *probs) {
    CALL(1, take_from(u, slots, num_slots, taken, count, coins, tokens, probs));
}

/* Verifies a drafted tree: 0 walks to the greatest scores, 1 is topdown, 2 is traversal (see control/estimates.py). */
EXPORT int64_t specdec_verify(Verification *v, int rule) {
    CALL(1, verify(v, rule));
}

EXPORT void specdec_write_mask(const Visibility *v) {
    for (int64_t row = 0; row < v->num_rows; row++)
        for (int64_t token = 0; token < v->num_new; token++) {
            const int64_t tail = v->lengths[row], end = tail + v->num_tail;
            const int64_t prompt_size = !v->prompt ? 0 : v->prompt_size < v->num_slots ? v->prompt_size : v->num_slots;
            uint8_t *out = v->out + (row * v->num_new + token) * v->num_slots;
            memset(out, 1, (size_t)tail);
            memcpy(out + tail, v->seen + row * v->seen_strides[0] + token * v->seen_strides[1], (size_t)v->num_tail);
            memset(out + end, 0, (size_t)(v->num_slots - end));
            for (int64_t slot = 0; slot < prompt_size; slot++) out[slot] &= v->prompt[row * v->prompt_size + slot];
        }
}

/* Moves slots of a text within its pages, each of `num_parts` times PAGE_SLOTS times slot_bytes; targets as below. */
EXPORT void specdec_move_in_pages(char *const *pages, int64_t num_parts, int64_t slot_bytes, const int64_t *sources,
                                  const int64_t *targets, int64_t num_moves) {
    for (int64_t i = 0; i < num_moves; i++) {
        char *from = pages[sources[i] / PAGE_SLOTS] + sources[i] % PAGE_SLOTS * slot_bytes;
        char *to = pages[targets[i] / PAGE_SLOTS] + targets[i] % PAGE_SLOTS * slot_bytes;
        for (int64_t part = 0; part < num_parts; part++)
            memmove(to + part * PAGE_SLOTS * slot_bytes, from + part * PAGE_SLOTS * slot_bytes, (size_t)slot_bytes);
    }
}

/* Moves slots of a row within each of many buffers [rows][heads][capacity][slot_bytes]; `numbers` holds heads, capacity
 * and slot_bytes of every buffer. Targets rise and none is above its source, so that no slot is overwritten before it is read. */
EXPORT void specdec_move(char *const *buffers, const int64_t *numbers, int64_t num_buffers, int64_t row,
                         const int64_t *sources, const int64_t *targets, int64_t num_moves) {
    for (int64_t b = 0; b < num_buffers; b++) {
        const int64_t heads = numbers[3 * b], capacity = numbers[3 * b + 1], bytes = numbers[3 * b + 2];
        for (int64_t head = 0; head < heads; head++)
            for (int64_t i = 0; i < num_moves; i++) {
                char *base = buffers[b] + (row * heads + head) * capacity * bytes;
                memmove(base + targets[i] * bytes, base + sources[i] * bytes, (size_t)bytes);
            }
    }
}
