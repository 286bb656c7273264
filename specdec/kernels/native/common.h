/* What the files of the native library share: shapes, sizes, the pool and the scratch memory (pool.c). */
#ifndef SPECDEC_COMMON_H
#define SPECDEC_COMMON_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define GROUP 64           /* inputs that share a quantisation scale within a row */
#define TILE 8             /* rows that pass over a strip of weights together */
#define STRIP 64           /* outputs that are computed between two looks at the pool */
#define CHUNK_BYTES 131072 /* weights per chunk of work: large enough for the prefetcher, small enough to balance */

/* float32 weights [n][k] (scale NULL), or packed int8 ones with a scale per output. */
typedef struct {
    const void *data;
    const float *scale, *bias; /* bias may be NULL */
    int64_t n, k;
} Matrix;

typedef struct {
    Matrix q, k, v, o, gate, up, down;
    const float *input_norm, *post_norm, *q_norm, *k_norm; /* q_norm and k_norm may be NULL */
    float input_eps, post_eps, head_eps;
    int64_t num_heads, num_kv_heads, head_dim;
} Layer;

/* Shape letters: B batch, T query tokens, S keys, H query heads, K key/value heads, D head_dim. Strides in elements. */
typedef struct {
    int64_t B, T, S, H, K, D;
    const float *q;     /* [B][T][H][D] */
    const float *k, *v; /* [b * strides[0] + head * strides[1] + s * strides[2] + d] */
    int64_t k_strides[3], v_strides[3];
    const void *mask;                      /* NULL (causal, last query = last key), uint8 or float32 */
    int64_t mask_is_bool, mask_strides[3]; /* batch, head, query; keys are contiguous */
    float scale;
    float *out;    /* [B][T][H][D] */
    float *scores; /* scratch [B][H][T][padded_keys] */
    int64_t padded_keys;
} Attention;

/* A row of scores whose tokens are drawn; peaks, sums and norm are scan()'s. */
typedef struct {
    const float *x, *peaks, *sums;
    double norm;
    int64_t vocab;
} UrnRow;

/* A drafted tree and the target's scores at its slots (slot 0 is the root; 0 stands for no slot). */
typedef struct {
    int64_t num_slots, depth, vocab;
    const float *p;                                       /* [num_slots][vocab] */
    const float *const *q;                                /* the draft's scores, by slot; leaves' are not read */
    const int64_t *tokens, *first_child, *next_sibling;   /* by slot */
    const double *coins;                                  /* by slot, and one for the token after the path */
    int64_t *path, count, next;                           /* found: slots, their number, the token after them */
    float *scratch, *rows;                                /* ours */
} Verification;

/* The entry points of one instruction set; each file that includes layer.h fills one in. */
typedef struct {
    const char *name;
    void (*pack)(const float *w, int64_t n, int64_t k, int8_t *packed, float *scale);
    void (*linear)(const Matrix *w, const float *x, int64_t rows, float *out);
    void (*attend)(Attention *a);
    void (*attention_inputs)(const Layer *l, const float *x, int64_t rows, const float *cos, const float *sin, float *q,
                             float *k, float *v);
    void (*attention_and_mlp)(const Layer *l, Attention *a, const float *x, float *out);
    void (*scan)(const float *x, int64_t rows, int64_t vocab, float *peaks, float *sums, double *norms);
    void (*take_tokens)(const UrnRow *u, int64_t *out, int64_t num_out, int64_t count, const double *coins,
                        int64_t *tokens, double *probs, double *scratch);
    void (*verify)(Verification *v, int rule);
} Kernels;

extern const Kernels kernels_avx2, kernels_avx512;

/* Runs fn(context, 0..num_chunks-1), in any order and on any thread; returns when all are done. */
typedef void (*chunk_fn)(void *context, int chunk);
void parallel_for(chunk_fn fn, void *context, int num_chunks);
int num_active_threads(void);

/* Scratch memory, 64-byte aligned, until the running call ends. */
void *take(size_t bytes);

/* Everything between these two is one call: it owns the pool and the scratch memory of the process. */
void begin_call(int num_threads);
void end_call(void);

/* Ahead of use; any address will do, also one that does not exist. */
#define prefetch_l2(p) __builtin_prefetch((const void *)(p), 0, 2)

static inline int32_t load_int32(const void *p) {
    int32_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

#endif
