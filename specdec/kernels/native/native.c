/* The native half of specdec.kernels: what a forward of a few tokens costs beside memory traffic, made small.
 *
 * Plain C on pointers, for x86-64 with AVX2 (better: AVX-512 VNNI): no torch headers, so any C compiler builds it in
 * seconds. Python (native.py) owns all tensors and checks all shapes; without this library torch does the work.
 * Reading order: common.h, rows.h, product.h, attention.h, layer.h, pool.c; simd_*.h as needed. */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "common.h"

#define EXPORT __attribute__((visibility("default")))

static const Kernels *kernels;

/* Chooses an instruction set by name, or the best one for NULL. Returns its name, NULL if there is none. */
EXPORT const char *specdec_select(const char *name) {
    __builtin_cpu_init();
    const Kernels *best = NULL;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (!name || !strcmp(name, "avx2")))
        best = &kernels_avx2;
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && (!name || !strcmp(name, "avx512")))
        best = &kernels_avx512;
    if (best) kernels = best;
    return best ? best->name : NULL;
}

EXPORT int64_t specdec_packed_bytes(int64_t n, int64_t k) {
    return (n + STRIP - 1) / STRIP * STRIP * ((k + GROUP - 1) / GROUP * GROUP);
}

/* w [n][k] -> packed int8 (layout in product.h) and one scale per output: w ~ scale * q, q in -127..127. */
EXPORT void specdec_pack(const float *w, int64_t n, int64_t k, int8_t *packed, float *scale, int num_threads) {
#ifdef MADV_HUGEPAGE
    const uintptr_t page = 1 << 21, begin = (uintptr_t)packed, end = begin + (uintptr_t)specdec_packed_bytes(n, k);
    const uintptr_t first = (begin + page - 1) & ~(page - 1), last = end & ~(page - 1);
    if (last > first) madvise((void *)first, last - first, MADV_HUGEPAGE); /* advice: failure costs only speed */
#endif
    begin_call(num_threads);
    kernels->pack(w, n, k, packed, scale);
    end_call();
}

EXPORT void specdec_linear(const Matrix *w, const float *x, int64_t rows, float *out, int num_threads) {
    begin_call(num_threads);
    kernels->linear(w, x, rows, out);
    end_call();
}

EXPORT void specdec_attend(Attention *a, int num_threads) {
    begin_call(num_threads);
    kernels->attend(a);
    end_call();
}

EXPORT void specdec_attention_inputs(const Layer *l, const float *x, int64_t rows, const float *cos, const float *sin,
                                     float *q, float *k, float *v, int num_threads) {
    begin_call(num_threads);
    kernels->attention_inputs(l, x, rows, cos, sin, q, k, v);
    end_call();
}

EXPORT void specdec_attention_and_mlp(const Layer *l, Attention *a, const float *x, float *out, int num_threads) {
    begin_call(num_threads);
    kernels->attention_and_mlp(l, a, x, out);
    end_call();
}

/* Peak and sum of every block of every row of scores (see draws.h), and the logarithm of each row's sum of e^x. */
EXPORT void specdec_scan(const float *x, int64_t rows, int64_t vocab, float *peaks, float *sums, double *norms) {
    kernels->scan(x, rows, vocab, peaks, sums, norms);
}

/* Takes `count` tokens from each of `rows` scanned rows: the next likeliest, or drawn if there are coins. `out` holds
 * num_out[i] tokens of row i that are gone, at `out_stride` from row to row, and has room for `count` more. */
EXPORT void specdec_take(const float *x, int64_t vocab, const float *peaks, const float *sums, const double *norms,
                         const int64_t *rows, int64_t num_rows, int64_t *out, const int64_t *num_out,
                         int64_t out_stride, int64_t count, const double *coins, int64_t *tokens, double *probs) {
    const int64_t num_blocks = (vocab + 255) / 256;
    begin_call(1);
    double *scratch = take((size_t)(2 * num_blocks) * sizeof(double));
    for (int64_t i = 0; i < num_rows; i++) {
        const int64_t row = rows[i];
        const UrnRow u = {x + row * vocab, peaks + row * num_blocks, sums + row * num_blocks, norms[row], vocab};
        kernels->take_tokens(&u, out + i * out_stride, num_out[i], count, coins ? coins + i * count : NULL,
                             tokens + i * count, probs + i * count, scratch);
    }
    end_call();
}

/* Verifies a drafted tree: 0 walks to the greatest scores, 1 is topdown, 2 is traversal (see acceptance.py). */
EXPORT void specdec_verify(Verification *v, int rule) {
    begin_call(1);
    kernels->verify(v, rule);
    end_call();
}

/* Moves slots within each of many buffers [heads][capacity][slot_bytes]; `numbers` holds heads, capacity and slot_bytes
 * of every buffer. Targets rise and none is above its source, so that no slot is overwritten before it is read. */
EXPORT void specdec_move(char *const *buffers, const int64_t *numbers, int64_t num_buffers, const int64_t *sources,
                         const int64_t *targets, int64_t num_moves) {
    for (int64_t b = 0; b < num_buffers; b++) {
        const int64_t heads = numbers[3 * b], capacity = numbers[3 * b + 1], bytes = numbers[3 * b + 2];
        for (int64_t head = 0; head < heads; head++)
            for (int64_t i = 0; i < num_moves; i++) {
                char *base = buffers[b] + head * capacity * bytes;
                memmove(base + targets[i] * bytes, base + sources[i] * bytes, (size_t)bytes);
            }
    }
}
