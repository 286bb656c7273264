/* Attention over a long, strided key/value cache, with an arbitrary mask.
 *
 * Query heads that share a key/value head are served together, so keys and values are read once per group. Scores are
 * summed over d in order, weights and values over keys in order, and a hidden key contributes exactly nothing: a
 * query's result depends only on the sequence of keys it sees, not on where they lie or who else is asking. That
 * makes a token verified in a tree bit-identical to the same token decoded alone, and to the same token of a prompt
 * that is read at once: a few queries have keys in the lanes of their vectors, many have queries there, and both add
 * in that order. */

#define KEY_BLOCK 64
#define MAX_QUERIES 6 /* that one inner loop serves */
#define MAX_HEAD_DIM 256
#define MANY_QUERIES LANES /* from here on, of a key/value head, queries are better off in lanes than keys */

/* The number of bytes up to the last that is not zero. */
static int64_t without_zeros_at_end(const uint8_t *bytes, int64_t count) {
    for (uint64_t words[4]; count >= 32; count -= 32) {
        memcpy(words, bytes + count - 32, 32);
        if (words[0] | words[1] | words[2] | words[3]) break;
    }
    while (count && !bytes[count - 1]) count--;
    return count;
}

/* A few queries, and how many keys the queries of each batch row see: what is behind the last of them is not read. */
typedef struct {
    const Attention *a;
    const int64_t *seen;
} FewQueries;

/* Keys up to the last that any query of a batch row sees; all of them, where that is not easily said. */
static int64_t seen_in_row(const Attention *a, int64_t b) {
    int64_t seen = a->mask && a->mask_is_bool ? 0 : a->S;
    for (int64_t h = 0; h < (a->mask_strides[1] ? a->H : 1); h++)
        for (int64_t t = 0; t < a->T && seen < a->S; t++) {
            const int64_t offset = b * a->mask_strides[0] + h * a->mask_strides[1] + t * a->mask_strides[2];
            const int64_t own = without_zeros_at_end((const uint8_t *)a->mask + offset + seen, a->S - seen);
            if (own) seen += own;
        }
    return seen;
}

/* Where the keys or the values of one batch row and head lie: all `stride` apart, or only those of a page. */
typedef struct {
    const char *const *pages;
    const float *first; /* with pages the offset in each of them */
    int64_t stride;
} Slots;

INLINE Slots keys_of(const Attention *a, int64_t b, int64_t head) {
    return (Slots){a->pages, a->k + b * a->k_strides[0] + head * a->k_strides[1], a->k_strides[2]};
}

INLINE Slots values_of(const Attention *a, int64_t b, int64_t head) {
    return (Slots){a->pages, a->v + b * a->v_strides[0] + head * a->v_strides[1], a->v_strides[2]};
}

INLINE const float *slot_at(const Slots *slots, int64_t s) {
    if (!slots->pages) return slots->first + s * slots->stride;
    return (const float *)(slots->pages[s / PAGE_SLOTS] + (uintptr_t)slots->first) + s % PAGE_SLOTS * slots->stride;
}

/* The end, at most `end`, of the slots from s on that lie `stride` apart. */
INLINE int64_t run_end(const Slots *slots, int64_t s, int64_t end) {
    const int64_t page_end = s / PAGE_SLOTS * PAGE_SLOTS + PAGE_SLOTS;
    return slots->pages && page_end < end ? page_end : end;
}

INLINE float *scores_of(const Attention *a, int64_t b, int64_t h, int64_t t) {
    return a->scores + ((b * a->H + h) * a->T + t) * a->padded_keys;
}

/* Dot products of `count` queries with one group of VL transposed keys. */
INLINE void score_queries(const int count, const Attention *a, int64_t b, int64_t h0, int64_t first, int64_t s,
                          const float *keys) {
    const float *query[MAX_QUERIES];
    VF acc[MAX_QUERIES];
    for (int i = 0; i < count; i++) {
        query[i] = a->q + ((b * a->T + (first + i) % a->T) * a->H + h0 + (first + i) / a->T) * a->D;
        acc[i] = vf_zero();
    }
    for (int64_t d = 0; d < a->D; d++) {
        VF key = vf_load(keys + d * VL);
        for (int i = 0; i < count; i++) acc[i] = vf_fma(vf_set1(query[i][d]), key, acc[i]);
    }
    for (int i = 0; i < count; i++) vf_store(scores_of(a, b, h0 + (first + i) / a->T, (first + i) % a->T) + s, acc[i]);
}

/* One chunk: all queries of one key/value head against KEY_BLOCK keys. */
TARGET static void score_chunk(void *context, int chunk) {
    const FewQueries *few = context;
    const Attention *a = few->a;
    const int64_t blocks = (a->padded_keys + KEY_BLOCK - 1) / KEY_BLOCK, group = a->H / a->K;
    const int64_t block = chunk % blocks, head = chunk / blocks % a->K, b = chunk / blocks / a->K;
    const Slots slots = keys_of(a, b, head);
    const int64_t end = (block + 1) * KEY_BLOCK < few->seen[b] ? (block + 1) * KEY_BLOCK : few->seen[b];
    float keys[MAX_HEAD_DIM * VL] __attribute__((aligned(64)));
    for (int64_t s = block * KEY_BLOCK; s < end; s += VL) {
        const float *rows[VL];
        for (int r = 0; r < VL; r++) rows[r] = slot_at(&slots, s + r < a->S ? s + r : a->S - 1);
        for (int64_t d = 0; d < a->D; d += 4) transpose4(rows, d, keys + d * VL);
        int64_t i = 0;
        for (; i + 6 <= group * a->T; i += 6) score_queries(6, a, b, head * group, i, s, keys);
        for (; i + 2 <= group * a->T; i += 2) score_queries(2, a, b, head * group, i, s, keys);
        for (; i < group * a->T; i++) score_queries(1, a, b, head * group, i, s, keys);
    }
}

/* The first `seen` scores -> exp(scaled, masked score - maximum), zero beyond the last visible key. */
INLINE void weigh(const Attention *a, int64_t seen, int64_t b, int64_t h, int64_t t) {
    float *scores = scores_of(a, b, h, t);
    const int64_t offset = b * a->mask_strides[0] + h * a->mask_strides[1] + t * a->mask_strides[2];
    const int64_t visible = a->mask ? seen : a->S - a->T + t + 1;
    VF highest = vf_set1(-INFINITY);
    for (int64_t s = 0; s < seen; s += VL) {
        uint8_t bytes[VL] = {0};
        float bias[VL] = {0};
        const int64_t count = visible - s < 0 ? 0 : visible - s < VL ? visible - s : VL;
        VF v = vf_mul(vf_load(scores + s), vf_set1(a->scale));
        if (a->mask && a->mask_is_bool && count) {
            memcpy(bytes, (const uint8_t *)a->mask + offset + s, (size_t)count);
        } else {
            memset(bytes, 1, (size_t)count);
            if (a->mask && count) {
                memcpy(bias, (const float *)a->mask + offset + s, (size_t)count * sizeof(float));
                v = vf_add(v, vf_load(bias));
            }
        }
        v = vf_mask_bytes(v, bytes);
        vf_store(scores + s, v);
        highest = vf_max(highest, v);
    }
    const float maximum = vf_peak(highest);
    if (maximum == -INFINITY) { /* a padding row: sees nothing, says nothing */
        memset(scores, 0, (size_t)seen * sizeof(float));
        return;
    }
    for (int64_t s = 0; s < seen; s += VL)
        vf_store(scores + s, vf_exp(vf_sub(vf_load(scores + s), vf_set1(maximum))));
}

/* out = weights @ values / sum(weights) for `count` queries of one key/value head, `width` vectors of d at a time. */
INLINE void mix_queries(const int count, const int width, const FewQueries *few, int64_t b, int64_t h0, int64_t first,
                        const Slots *slots, int64_t d) {
    const Attention *a = few->a;
    const float *weights[MAX_QUERIES];
    VF acc[MAX_QUERIES][4], sum[MAX_QUERIES];
    for (int i = 0; i < count; i++) {
        weights[i] = scores_of(a, b, h0 + (first + i) / a->T, (first + i) % a->T);
        sum[i] = vf_zero();
        for (int j = 0; j < width; j++) acc[i][j] = vf_zero();
    }
    for (int64_t s = 0, end; s < few->seen[b]; s = end) {
        const float *v = slot_at(slots, s) + d;
        end = run_end(slots, s, few->seen[b]);
        for (int64_t place = s; place < end; place++, v += slots->stride) {
            VF value[4];
            for (int j = 0; j < width; j++) value[j] = vf_load(v + j * VL);
            for (int i = 0; i < count; i++) {
                VF weight = vf_set1(weights[i][place]);
                sum[i] = vf_add(sum[i], weight);
                for (int j = 0; j < width; j++) acc[i][j] = vf_fma(weight, value[j], acc[i][j]);
            }
        }
    }
    for (int i = 0; i < count; i++) {
        float *out = a->out + ((b * a->T + (first + i) % a->T) * a->H + h0 + (first + i) / a->T) * a->D + d;
        VF total = vf_max(sum[i], vf_set1(1e-30f));
        for (int j = 0; j < width; j++) vf_store(out + j * VL, vf_div(acc[i][j], total));
    }
}

/* One chunk: softmax and mixing for up to MIX_QUERIES queries of one key/value head. */
#define MIX_QUERIES 4
TARGET static void mix_chunk(void *context, int chunk) {
    const FewQueries *few = context;
    const Attention *a = few->a;
    const int64_t group = a->H / a->K, queries = group * a->T, tiles = (queries + MIX_QUERIES - 1) / MIX_QUERIES;
    const int64_t first = chunk % tiles * MIX_QUERIES, head = chunk / tiles % a->K, b = chunk / tiles / a->K;
    const Slots slots = values_of(a, b, head);
    const int64_t count = queries - first < MIX_QUERIES ? queries - first : MIX_QUERIES;
    for (int64_t i = first; i < first + count; i++) weigh(a, few->seen[b], b, head * group + i / a->T, i % a->T);
    const int width = REGISTERS == 32 ? 4 : 2;
    for (int64_t d = 0; d < a->D;) {
        const int wide = d + width * VL <= a->D;
        int64_t i = 0;
        for (; wide && i + 4 <= count; i += 4) mix_queries(4, width, few, b, head * group, first + i, &slots, d);
        for (; wide && i + 2 <= count; i += 2) mix_queries(2, width, few, b, head * group, first + i, &slots, d);
        for (; wide && i < count; i++) mix_queries(1, width, few, b, head * group, first + i, &slots, d);
        for (; !wide && i < count; i++) mix_queries(1, 1, few, b, head * group, first + i, &slots, d);
        d += wide ? width * VL : VL;
    }
}

#include "tiles.h"

/* The texts of a forward that have few queries: each has some chunks of both kinds. */
typedef struct {
    FewQueries *few;
    int64_t count, *first_scoring, *first_mixing; /* [count + 1] */
} FewOfMany;

static FewQueries *find_text(const FewOfMany *texts, const int64_t *firsts, int *chunk) {
    int64_t low = 0, high = texts->count - 1;
    while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (firsts[middle] <= *chunk)
            low = middle;
        else
            high = middle - 1;
    }
    *chunk -= (int)firsts[low];
    return texts->few + low;
}

TARGET static void score_text_chunk(void *context, int chunk) {
    const FewOfMany *texts = context;
    FewQueries *few = find_text(texts, texts->first_scoring, &chunk);
    score_chunk(few, chunk);
}

TARGET static void mix_text_chunk(void *context, int chunk) {
    const FewOfMany *texts = context;
    FewQueries *few = find_text(texts, texts->first_mixing, &chunk);
    mix_chunk(few, chunk);
}

/* All that is to be attended to in a layer: texts of many queries one by one, the others side by side. */
static void attend_all(Attention *attentions, int64_t count) {
    FewOfMany texts = {take((size_t)count * sizeof(FewQueries)), 0, take((size_t)(count + 1) * sizeof(int64_t)),
                       take((size_t)(count + 1) * sizeof(int64_t))};
    texts.first_scoring[0] = texts.first_mixing[0] = 0;
    for (int64_t i = 0; i < count; i++) {
        Attention *a = attentions + i;
        const int64_t queries = a->H / a->K * a->T;
        if (queries >= MANY_QUERIES) {
            attend_in_tiles(a);
            continue;
        }
        a->padded_keys = (a->S + VL - 1) / VL * VL;
        a->scores = take((size_t)(a->B * a->H * a->T * a->padded_keys) * sizeof(float));
        int64_t *seen = take((size_t)a->B * sizeof(int64_t));
        for (int64_t b = 0; b < a->B; b++) seen[b] = seen_in_row(a, b);
        texts.few[texts.count] = (FewQueries){a, seen};
        const int64_t blocks = (a->padded_keys + KEY_BLOCK - 1) / KEY_BLOCK;
        const int64_t tiles = (queries + MIX_QUERIES - 1) / MIX_QUERIES, next = texts.count + 1;
        texts.first_scoring[next] = texts.first_scoring[texts.count] + a->B * a->K * blocks;
        texts.first_mixing[next] = texts.first_mixing[texts.count] + a->B * a->K * tiles;
        texts.count = next;
    }
    if (!texts.count) return;
    parallel_for(score_text_chunk, &texts, (int)texts.first_scoring[texts.count]);
    parallel_for(mix_text_chunk, &texts, (int)texts.first_mixing[texts.count]);
}

static void attend(Attention *a) { attend_all(a, 1); }
