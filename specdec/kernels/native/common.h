/* What the files of the native library share: shapes, sizes, the pool and the scratch memory (pool.c). */
#ifndef SPECDEC_COMMON_H
#define SPECDEC_COMMON_H

#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define GROUP 64           /* inputs that share a quantisation scale within a row */
#define GROUP4_BYTES 640   /* of 16 outputs' 4-bit weights for so many inputs, with their scales and offsets */
#define GROUPED_BYTES 1152 /* of 16 outputs' weights in bytes for so many inputs, with their scales */
#define TILE 8             /* rows that pass over a strip of weights together */
#define WIDE_TILE 16       /* the same where the processor has tiles (AMX) and there are rows enough to fill them */
#define STRIP 64           /* outputs that are computed between two looks at the pool */
#define CHUNK_BYTES 131072 /* weights per chunk of work: large enough for the prefetcher, small enough to balance */
#define OUT_OF_MEMORY (-2) /* what an entry point returns that found no memory; Python raises MemoryError */

#define PAGE_SLOTS 16 /* slots of a page of keys and values: of one head they lie beside each other */

#define BLOCK 256 /* tokens whose weights are known as a sum; a token is found in its block */
#define NUM_BLOCKS(vocab) (((vocab) + BLOCK - 1) / BLOCK)
#define PADDED_BLOCKS(vocab) ((NUM_BLOCKS(vocab) + 15) / 16 * 16) /* whole vectors, whatever their width */

/* The structures from here to Verification are described in __init__.py too; layout.c lets it compare. */

/* What `bits` says of packed weights that are kept in bytes with scales among them, as blocks of GGUF files are. */
enum { BYTES5 = 5, BYTES6 = 6, BYTES8 = 9 };

/* Types of blocks, by their numbers in GGUF files. */
enum { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 };

/* float32 weights [n][k] (32 bits), bfloat16 ones (16), or packed ones: of 8 bits with a scale per output, of 4 with
 * scales among them, or BYTES5, BYTES6, BYTES8; layouts in product.h. */
typedef struct {
    const void *data;
    const float *scale, *bias; /* scale: of 8 bits only; bias may be NULL */
    int64_t n, k, bits;
} Matrix;

typedef struct {
    Matrix q, k, v, o, gate, up, down;
    const float *input_norm, *post_norm, *q_norm, *k_norm; /* q_norm and k_norm may be NULL */
    float input_eps, post_eps, head_eps;
    int64_t num_heads, num_kv_heads, head_dim;
} Layer;

/* Shape letters: B batch, T query tokens, S keys, H query heads, K key/value heads, D head_dim. Strides in elements.
 * Where `pages` is not NULL, B is 1, and slot s lies s % PAGE_SLOTS strides behind where k and v would say it is if
 * pages[s / PAGE_SLOTS] were their origin: k and v are then offsets, in bytes, of a layer's keys and values in a page. */
typedef struct {
    int64_t B, T, S, H, K, D;
    const float *q;     /* [B][T][H][D] */
    const float *k, *v; /* [b * strides[0] + head * strides[1] + s * strides[2] + d] */
    int64_t k_strides[3], v_strides[3];
    const char *const *pages;
    const void *mask;                      /* NULL (causal, last query = last key), uint8 or float32 */
    int64_t mask_is_bool, mask_strides[3]; /* batch, head, query; keys are contiguous */
    float scale;
    float *out;    /* [B][T][H][D] */
    float *scores; /* scratch [B][H][T][padded_keys] */
    int64_t padded_keys;
} Attention;

/* Rows of tokens that go through layers together. Attention by `count` texts, whose tokens lie one after the other; the
 * keys and values of token r are stored at places[r], plus the offsets of a layer. What a layer leaves is copied to
 * kept[layer] if that is not NULL. */
typedef struct {
    const Layer *layers;
    int64_t num_layers, rows;
    const float *x, *cos, *sin; /* [rows][channels], [rows][head_dim]; cos may be NULL */
    Attention *attentions;      /* k, v and q are filled in, layer by layer */
    int64_t count;
    char *const *places;
    float *q, *k, *v, *hidden, *out; /* scratch [rows][heads][head_dim] and [rows][channels]; out is the result */
    float *const *kept;
} PackedForward;

/* The tokens of a cache's rows that go through layers together: T of each of B rows, whose keys and values are stored
 * from slot firsts[row] on. keys and values are a layer's in the cache, with the strides of `attention`. */
typedef struct {
    const Layer *layers;
    int64_t num_layers, q_apart; /* floats between the queries of a layer and of the next; 0: nobody reads them later */
    const float *x, *cos, *sin;  /* [B][T][channels], [B][T][head_dim]; cos may be NULL */
    Attention *attention;       /* k, v and q are filled in, layer by layer */
    float *const *keys, *const *values;
    const int64_t *firsts;
    float *q, *k, *v, *hidden, *out; /* scratch [B][T][heads][head_dim] and [B][T][channels]; out is the result */
} StackForward;

/* The layers of a draft head, of which the first reads what a product makes of a token's embedding and a state beside it. */
typedef struct {
    StackForward layers; /* x, cos and sin are filled in: x [B][T][channels], cos and sin [B][T][head_dim] */
    Matrix first;
    const float *embeddings; /* [num_embeddings][channels]; tokens past them have the last one */
    int64_t num_embeddings;
    const int64_t *tokens, *positions; /* [B][T] */
    const float *states;               /* [B][T][first.k - channels] */
    const float *cos, *sin;            /* by position: [positions][head_dim] */
} HeadForward;

/* What a draft head's layers leave, through a product, a norm and an LM head. */
typedef struct {
    Matrix last, lm_head;
    const float *norm;
    float eps;
    const float *x; /* [rows][last.k] */
    int64_t rows;
    float *logits; /* [rows][lm_head.n] */
} HeadLogits;

/* Rows of scores whose tokens are taken out. What a scan of a row finds is kept; a norm is NaN before it. Blocks are
 * draws.h's, padded. */
typedef struct {
    const float *x;         /* [rows][vocab] */
    int64_t vocab;
    float *peaks, *shares; /* [rows][blocks] */
    double *norms;
} Candidates;

/* The tokens that were taken from some rows before, with room for `room` in each; nothing is read where that is 0. */
typedef struct {
    const int64_t *tokens, *counts;
    int64_t room;
} Taken;

/* What the new tokens of a forward see; see specdec.tree_model.masks.visible_slots. The keys of `seen` are contiguous. */
typedef struct {
    int64_t num_rows, num_new, num_tail, num_slots, prompt_size;
    const uint8_t *seen; /* [row * seen_strides[0] + token * seen_strides[1] + tail slot] */
    int64_t seen_strides[2];
    const int64_t *lengths;
    const uint8_t *prompt; /* [num_rows][prompt_size], NULL if none is padding */
    uint8_t *out;          /* [num_rows][num_new][num_slots] */
} Visibility;

/* A drafted tree and the target's scores at its slots (slot 0 is the root, node i is slot i + 1). */
typedef struct {
    int64_t num_slots, size, depth, vocab;
    const float *p;                          /* [num_slots][vocab] */
    const float *const *q;                   /* the draft's scores, by slot; leaves' are not read */
    const int64_t *tokens, *parents;         /* by node */
    const double *coins;                     /* by slot, and one for the token after the path */
    int64_t *path, count, next;              /* found: nodes, their number, the token after them */
    int64_t *first_child, *next_sibling;     /* ours: by slot, 0 for none */
    float *scratch, *rows;                   /* ours */
} Verification;

/* The entry points of one instruction set; each file that includes layer.h fills one in. */
typedef struct {
    const char *name;
    void (*pack)(const float *w, int64_t n, int64_t k, int64_t bits, int8_t *packed, float *scale);
    void (*repack)(int64_t type, const uint8_t *blocks, const int64_t *rows, int64_t n, int64_t k, int8_t *packed,
                   int64_t *too_large);
    void (*linear)(const Matrix *w, const float *x, int64_t rows, int weight_only, float *out);
    void (*attend)(Attention *a);
    void (*attention_inputs)(const Layer *l, const float *x, int64_t rows, const float *cos, const float *sin, float *q,
                             float *k, float *v);
    void (*attention_and_mlp)(const Layer *l, Attention *a, const float *x, float *out);
    void (*packed_layer)(const PackedForward *f, int64_t layer, const float *x, float *out);
    void (*stack_layer)(const StackForward *f, int64_t layer, const float *x, float *out);
    void (*head_inputs)(const HeadForward *f);
    void (*head_logits)(const HeadLogits *f);
    void (*take_from)(const Candidates *u, const int64_t *slots, int64_t num_slots, const Taken *taken, int64_t count,
                      const double *coins, int64_t *tokens, double *probs);
    void (*verify)(Verification *v, int rule);
} Kernels;

#ifdef __x86_64__
extern const Kernels kernels_avx2, kernels_avx512;

#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11 /* that know what comes here */
#define HAS_AVX_VNNI
extern const Kernels kernels_avxvnni;
#ifdef __linux__
#define HAS_AMX /* the system can be asked for its registers */
extern const Kernels kernels_amx;
#endif
#endif
#define pause_spinning() __builtin_ia32_pause()

#elif defined(__aarch64__)
extern const Kernels kernels_neon;

/* Older compilers know extensions only of a whole file: those that the system's processors all have. */
#if defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 10
#define KNOWS_EXTENSIONS 1
#define EXTENSIONS(names) , target("arch=armv8.2-a" names)
#else
#define KNOWS_EXTENSIONS 0
#define EXTENSIONS(names)
#endif
#if KNOWS_EXTENSIONS || defined(__ARM_FEATURE_DOTPROD)
#define HAS_DOTPROD
extern const Kernels kernels_dotprod;
#endif
#if KNOWS_EXTENSIONS || defined(__ARM_FEATURE_MATMUL_INT8)
#define HAS_I8MM
extern const Kernels kernels_i8mm;
#endif
#define pause_spinning() __asm__ volatile("yield")

#else /* no kernels: the library says so */
#define pause_spinning() (void)0
#endif

/* The best kernels that a processor can run, of a name or (NULL) of all; NULL if there are none. */
const Kernels *best_kernels(const char *name);

/* Runs fn(context, 0..num_chunks-1), in any order and on any thread; returns when all are done. */
typedef void (*chunk_fn)(void *context, int chunk);
void parallel_for(chunk_fn fn, void *context, int num_chunks);
int num_active_threads(void);

/* Scratch memory, 64-byte aligned, until the running call ends. Where there is none it does not return: it jumps to
 * `memory_ran_out`, and the call ends. So it is for the calling thread between two jobs, never for a chunk of one, and
 * whoever takes scratch memory holds nothing else that has to be given back. */
void *take(size_t bytes);
extern jmp_buf memory_ran_out;

/* Everything between these two is one call: it owns the pool and the scratch memory of the process. */
void begin_call(int num_threads);
void end_call(void);

/* For tests, see native.c. */
void fail_allocation_after(int64_t count);
void use_all_threads(int is_on);

/* Ahead of use; any address will do, also one that does not exist. */
#define prefetch_l1(p) __builtin_prefetch((const void *)(p), 0, 3)
#define prefetch_l2(p) __builtin_prefetch((const void *)(p), 0, 2)

/* Of a block of 16 outputs' packed weights for GROUP inputs. */
static inline int64_t group_bytes(int64_t bits) {
    return bits == 8 ? GROUP * 16 : bits == 4 ? GROUP4_BYTES : GROUPED_BYTES;
}

/* Keeps a compiler from deriving a pointer from others: it would keep dozens of sums in registers that are needed. */
#define on_its_own(pointer) __asm__("" : "+r"(pointer))

static inline int32_t load_int32(const void *p) {
    int32_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

#endif
