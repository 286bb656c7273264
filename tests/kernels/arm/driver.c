/* Calls the native library as a list of commands says: for an emulated processor, on which there is no Python.
 *
 *     driver INSTRUCTION_SET < commands > answers
 *
 * A command is eight numbers of 64 bits, then the arrays that it needs; see test_arm.py, which writes them. */
#include <stdio.h>
#include <stdlib.h>

#include "common.h"

const char *specdec_select(const char *name);
int64_t specdec_packed_bytes(int64_t n, int64_t k, int64_t bits);
int64_t specdec_pack(const float *w, int64_t n, int64_t k, int64_t bits, int8_t *packed, float *scale, int num_threads);
int64_t specdec_linear(const Matrix *w, const float *x, int64_t rows, int weight_only, float *out, int num_threads);
int64_t specdec_attend(Attention *a, int num_threads);
int64_t specdec_attention_inputs(const Layer *l, const float *x, int64_t rows, const float *cos, const float *sin, float *q,
                                 float *k, float *v, int num_threads);
int64_t specdec_attention_and_mlp(const Layer *l, Attention *a, const float *x, float *out, int num_threads);
int64_t specdec_take(const Candidates *u, const int64_t *slots, int64_t num_slots, const Taken *taken, int64_t count,
                     const double *coins, int64_t *tokens, double *probs);

enum { PACK, LINEAR, ATTEND, LAYER, TAKE };
#define NUM_THREADS 2

static void *room(int64_t bytes) {
    void *memory = calloc((size_t)bytes + 64, 1);
    if (!memory) exit(3);
    return memory;
}

static void *input(int64_t bytes) {
    void *memory = room(bytes);
    if (fread(memory, 1, (size_t)bytes, stdin) != (size_t)bytes) exit(4);
    return memory;
}

static float *floats(int64_t count) { return input(count * 4); }

static void answer(const void *memory, int64_t bytes) { fwrite(memory, 1, (size_t)bytes, stdout); }

static void check(int64_t status) {
    if (status) exit(5);
}

/* The weights come as they lie in memory; a scale for each output comes with 8 bits. */
static Matrix matrix(int64_t n, int64_t k, int64_t bits) {
    const int64_t bytes = bits < 16 ? specdec_packed_bytes(n, k, bits) : n * k * bits / 8;
    Matrix m = {.data = input(bytes), .n = n, .k = k, .bits = bits};
    if (bits == 8) m.scale = floats(n);
    return m;
}

static void pack(int64_t n, int64_t k, int64_t bits) {
    const int64_t bytes = specdec_packed_bytes(n, k, bits);
    int8_t *packed = room(bytes);
    float *scale = room(4 * n);
    check(specdec_pack(floats(n * k), n, k, bits, packed, scale, NUM_THREADS));
    answer(packed, bytes), answer(scale, 4 * n);
}

static void linear(int64_t n, int64_t k, int64_t bits, int64_t rows, int64_t weight_only) {
    const Matrix w = matrix(n, k, bits);
    float *out = room(4 * rows * n);
    check(specdec_linear(&w, floats(rows * k), rows, (int)weight_only, out, NUM_THREADS));
    answer(out, 4 * rows * n);
}

/* [B][T][H][D] queries, [B][K][S][D] keys and values, [B][T][S] what is seen. */
static void attend(int64_t B, int64_t T, int64_t S, int64_t H, int64_t K, int64_t D) {
    Attention a = {.B = B, .T = T, .S = S, .H = H, .K = K, .D = D, .mask_is_bool = 1, .scale = 0.125f};
    a.q = floats(B * T * H * D), a.k = floats(B * K * S * D), a.v = floats(B * K * S * D), a.mask = input(B * T * S);
    for (int i = 0; i < 3; i++) a.k_strides[i] = a.v_strides[i] = (int64_t[]){K * S * D, S * D, D}[i];
    a.mask_strides[0] = T * S, a.mask_strides[2] = S;
    a.out = room(4 * B * T * H * D);
    check(specdec_attend(&a, NUM_THREADS));
    answer(a.out, 4 * B * T * H * D);
}

/* A layer over the tokens of one prompt. */
static void layer(int64_t rows, int64_t H, int64_t K, int64_t D, int64_t hidden, int64_t mlp, int64_t bits) {
    Layer l = {.num_heads = H, .num_kv_heads = K, .head_dim = D, .input_eps = 1e-5f, .post_eps = 1e-5f, .head_eps = 1e-5f};
    l.q = matrix(H * D, hidden, bits), l.k = matrix(K * D, hidden, bits), l.v = matrix(K * D, hidden, bits);
    l.o = matrix(hidden, H * D, bits), l.gate = matrix(mlp, hidden, bits), l.up = matrix(mlp, hidden, bits);
    l.down = matrix(hidden, mlp, bits);
    l.input_norm = floats(hidden), l.post_norm = floats(hidden), l.q_norm = floats(D), l.k_norm = floats(D);
    const float *x = floats(rows * hidden), *cos = floats(rows * D), *sin = floats(rows * D);
    float *q = room(4 * rows * H * D), *k = room(4 * rows * K * D), *v = room(4 * rows * K * D), *out = room(4 * rows * hidden);
    check(specdec_attention_inputs(&l, x, rows, cos, sin, q, k, v, NUM_THREADS));
    Attention a = {.B = 1, .T = rows, .S = rows, .H = H, .K = K, .D = D, .q = q, .k = k, .v = v, .scale = 0.125f};
    a.k_strides[1] = a.v_strides[1] = D, a.k_strides[2] = a.v_strides[2] = K * D;
    check(specdec_attention_and_mlp(&l, &a, x, out, NUM_THREADS));
    answer(out, 4 * rows * hidden);
}

/* Tokens taken from one row of scores: drawn, or the likeliest. */
static void take_tokens(int64_t vocab, int64_t count, int64_t is_drawn) {
    Candidates u = {.x = floats(vocab), .vocab = vocab};
    const double *coins = is_drawn ? input(8 * count) : NULL;
    double norm = 0.0 / 0.0, *probs = room(8 * count);
    int64_t slot = 0, *tokens = room(8 * count);
    const Taken taken = {0};
    u.norms = &norm, u.peaks = room(4 * PADDED_BLOCKS(vocab)), u.shares = room(4 * PADDED_BLOCKS(vocab));
    check(specdec_take(&u, &slot, 1, &taken, count, coins, tokens, probs));
    answer(tokens, 8 * count), answer(probs, 8 * count);
}

int main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : NULL, *found = specdec_select(name);
    if (!found) return 2;
    fprintf(stderr, "%s\n", found);
    int64_t n[8];
    while (fread(n, 8, 8, stdin) == 8) {
        if (n[0] == PACK) pack(n[1], n[2], n[3]);
        if (n[0] == LINEAR) linear(n[1], n[2], n[3], n[4], n[5]);
        if (n[0] == ATTEND) attend(n[1], n[2], n[3], n[4], n[5], n[6]);
        if (n[0] == LAYER) layer(n[1], n[2], n[3], n[4], n[5], n[6], n[7]);
        if (n[0] == TAKE) take_tokens(n[1], n[2], n[3]);
    }
    return 0;
}
