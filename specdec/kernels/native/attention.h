/* Attention over a long, strided key/value cache, with an arbitrary mask.
 *
 * Query heads that share a key/value head are served together, so keys and values are read once per group. Scores are
 * summed over d in order, weights and values over keys in order, and a hidden key contributes exactly nothing: a
 * query's result depends only on the sequence of keys it sees, not on where they lie or who else is asking. That
 * makes a token verified in a tree bit-identical to the same token decoded alone, and to the same token of a prompt
 * that is read at once: a few queries have keys in the lanes of their vectors, many have queries there, and both add
 * in that order. */

#define KEY_BLOCK 64
#define SCORED_KEYS (2 * VL) /* whose scores are summed at once */
#define MIXED_KEYS 64        /* whose values stay in the cache until all queries have had them */
#define MAX_QUERIES 6        /* that one inner loop serves */
#define MAX_HEAD_DIM 256
#define MANY_QUERIES 96 /* from here on, of a key/value head, queries are better off in lanes than keys */

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
    float *totals; /* [B][K][queries] sums of weights */
    int64_t slices, parts;
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

/* Queries of a key/value head are numbered: all tokens of its first query head, then those of the next. */
INLINE float *query_row(float *rows, const Attention *a, int64_t b, int64_t head, int64_t i) {
    const int64_t group = a->H / a->K;
    return rows + ((b * a->T + i % a->T) * a->H + head * group + i / a->T) * a->D;
}

INLINE float *scores_of(const Attention *a, int64_t b, int64_t head, int64_t i) {
    return a->scores + ((b * a->K + head) * (a->H / a->K * a->T) + i) * a->padded_keys;
}

/* How many of `left` queries go through the next inner loop: parts are of about the same size, since a small one waits
 * for its own sums. */
INLINE int64_t next_part(int64_t left, int64_t most) {
    const int64_t parts = (left + most - 1) / most;
    return (left + parts - 1) / parts;
}

/* Calls an inline function with the number of queries, 1 to MAX_QUERIES, as a constant. */
#define WITH_COUNT(count, function, ...)           \
    switch (count) {                               \
        case 1: function(1, __VA_ARGS__); break;   \
        case 2: function(2, __VA_ARGS__); break;   \
        case 3: function(3, __VA_ARGS__); break;   \
        case 4: function(4, __VA_ARGS__); break;   \
        case 5: function(5, __VA_ARGS__); break;   \
        default: function(6, __VA_ARGS__); break;  \
    }

/* Dot products of `count` queries with SCORED_KEYS transposed keys; each query's scores are `apart` from the last one's. */
INLINE void score_queries(const int count, const float *const *query, int64_t D, const float *keys, float *scores,
                          int64_t apart) {
    VF acc[MAX_QUERIES][2];
    for (int i = 0; i < count; i++) acc[i][0] = acc[i][1] = vf_zero();
    for (int64_t d = 0; d < D; d++) {
        const VF low = vf_load(keys + d * VL), high = vf_load(keys + (D + d) * VL);
        for (int i = 0; i < count; i++) {
            const VF value = vf_set1(query[i][d]);
            acc[i][0] = vf_fma(value, low, acc[i][0]);
            acc[i][1] = vf_fma(value, high, acc[i][1]);
        }
    }
    for (int i = 0; i < count; i++)
        for (int j = 0; j < 2; j++) vf_store(scores + i * apart + j * VL, acc[i][j]);
}

/* out[half][d][key] of SCORED_KEYS keys; asks for those that come KEY_BLOCK later. */
INLINE void transpose_keys(const Attention *a, const Slots *slots, int64_t s, float *out) {
    for (int j = 0; j < 2; j++) {
        const float *rows[VL];
        for (int r = 0; r < VL; r++) {
            const int64_t place = s + j * VL + r, later = place + KEY_BLOCK;
            rows[r] = slot_at(slots, place < a->S ? place : a->S - 1);
            if (later < a->S)
                for (int64_t d = 0; d < a->D; d += 16) prefetch_l2(slot_at(slots, later) + d);
        }
        for (int64_t d = 0; d < a->D; d += 4) transpose4(rows, d, out + (j * a->D + d) * VL);
    }
}

/* One chunk: all queries of one key/value head against KEY_BLOCK keys. */
TARGET static void score_chunk(void *context, int chunk) {
    const FewQueries *few = context;
    const Attention *a = few->a;
    const int64_t blocks = (a->S + KEY_BLOCK - 1) / KEY_BLOCK, queries = a->H / a->K * a->T;
    const int64_t block = chunk % blocks, head = chunk / blocks % a->K, b = chunk / blocks / a->K;
    const Slots slots = keys_of(a, b, head);
    const int64_t end = (block + 1) * KEY_BLOCK < few->seen[b] ? (block + 1) * KEY_BLOCK : few->seen[b];
    float keys[MAX_HEAD_DIM * SCORED_KEYS] __attribute__((aligned(64))), *scores = scores_of(a, b, head, 0);
    const float *rows[MANY_QUERIES];
    for (int64_t i = 0; i < queries; i++) rows[i] = query_row((float *)a->q, a, b, head, i);
    for (int64_t s = block * KEY_BLOCK; s < end; s += SCORED_KEYS) {
        transpose_keys(a, &slots, s, keys);
        for (int64_t i = 0, count; i < queries; i += count) {
            count = next_part(queries - i, MAX_QUERIES);
            WITH_COUNT(count, score_queries, rows + i, a->D, keys, scores + i * a->padded_keys + s, a->padded_keys)
        }
    }
}

/* The first `seen` scores of a query, scaled, with -inf for keys that it does not see; returns the highest. */
INLINE float mask_scores(const Attention *a, int64_t seen, int64_t b, int64_t h, int64_t t, float *scores) {
    const int64_t offset = b * a->mask_strides[0] + h * a->mask_strides[1] + t * a->mask_strides[2];
    const int64_t visible = a->mask ? seen : a->S - a->T + t + 1;
    VF highest = vf_set1(-INFINITY);
    for (int64_t s = 0; s < seen; s += VL) {
        uint8_t bytes[VL] = {0};
        float bias[VL] = {0};
        const int64_t count = visible - s < 0 ? 0 : visible - s < VL ? visible - s : VL;
        VF v = vf_mul(vf_load(scores + s), vf_set1(a->scale));
        if (a->mask && a->mask_is_bool && count == VL) {
            v = vf_mask_bytes(v, (const uint8_t *)a->mask + offset + s);
        } else if (count < VL || a->mask) {
            if (a->mask && a->mask_is_bool) {
                memcpy(bytes, (const uint8_t *)a->mask + offset + s, (size_t)count);
            } else {
                memset(bytes, 1, (size_t)count);
                if (a->mask) {
                    memcpy(bias, (const float *)a->mask + offset + s, (size_t)count * sizeof(float));
                    v = vf_add(v, vf_load(bias));
                }
            }
            v = vf_mask_bytes(v, bytes);
        }
        vf_store(scores + s, v);
        highest = vf_max(highest, v);
    }
    return vf_peak(highest);
}

/* One chunk: the scores of up to VL queries of a key/value head -> exp(score - maximum), and their sums. Queries are in
 * the lanes of those, because a sum in the order of keys waits for each addition. */
TARGET static void weigh_chunk(void *context, int chunk) {
    const FewQueries *few = context;
    const Attention *a = few->a;
    const int64_t group = a->H / a->K, queries = group * a->T, parts = (queries + VL - 1) / VL;
    const int64_t first = chunk % parts * VL, head = chunk / parts % a->K, b = chunk / parts / a->K;
    const int count = (int)(queries - first < VL ? queries - first : VL);
    const int64_t seen = few->seen[b], end = (seen + VL - 1) / VL * VL;
    float *scores[VL], maxima[VL] = {0}, lanes[4 * VL] __attribute__((aligned(64)));
    for (int i = 0; i < VL; i++) {
        const int64_t own = first + (i < count ? i : count - 1);
        scores[i] = scores_of(a, b, head, own);
        if (i < count) maxima[i] = mask_scores(a, seen, b, head * group + own / a->T, own % a->T, scores[i]);
        if (maxima[i] == -INFINITY) maxima[i] = 0; /* a padding row: sees nothing, and gets zeros for weights */
    }
    VF sums = vf_zero();
    for (int64_t s = 0; s < end; s += VL) {
        for (int i = 0; i < count; i++)
            vf_store(scores[i] + s, vf_exp(vf_sub(vf_load(scores[i] + s), vf_set1(maxima[i]))));
        for (int64_t part = s; part < s + VL; part += 4) {
            transpose4((const float *const *)scores, part, lanes);
            for (int r = 0; r < 4; r++) sums = vf_add(sums, vf_load(lanes + r * VL));
        }
    }
    vf_store(lanes, sums);
    memcpy(few->totals + (b * a->K + head) * queries + first, lanes, (size_t)count * sizeof(float));
}

/* out += weights @ values over the keys [s, end), for `count` queries of a key/value head and `width` vectors of d. Asks
 * for the values that come `ahead` of each. */
INLINE void mix_queries(const int count, const int width, const float *weights, int64_t apart, float *const *out,
                        const Slots *slots, int64_t s, int64_t end, int64_t ahead, int64_t d) {
    VF acc[MAX_QUERIES][4];
    for (int i = 0; i < count; i++)
        for (int j = 0; j < width; j++) acc[i][j] = vf_load(out[i] + d + j * VL);
    for (int64_t stop; s < end;) {
        const float *v = slot_at(slots, s) + d, *later = slot_at(slots, s + ahead) + d;
        stop = run_end(slots, s, end);
        for (; s < stop; s++, v += slots->stride, later += slots->stride) {
            VF value[4];
            for (int j = 0; j < width; j++) value[j] = vf_load(v + j * VL);
            for (int j = 0; j < width; j += 16 / VL) prefetch_l2(later + j * VL);
            for (int i = 0; i < count; i++) {
                const VF weight = vf_set1(weights[i * apart + s]);
                for (int j = 0; j < width; j++) acc[i][j] = vf_fma(weight, value[j], acc[i][j]);
            }
        }
    }
    for (int i = 0; i < count; i++)
        for (int j = 0; j < width; j++) vf_store(out[i] + d + j * VL, acc[i][j]);
}

#define MIX_WIDE(count, ...) mix_queries(count, 4, __VA_ARGS__)
#define MIX_NARROW(count, ...) mix_queries(count, 2, __VA_ARGS__)
#define MIX_ONE(count, ...) mix_queries(count, 1, __VA_ARGS__)

/* One chunk: a slice of the values of a key/value head, mixed for a part of its queries. */
TARGET static void mix_chunk(void *context, int chunk) {
    const FewQueries *few = context;
    const Attention *a = few->a;
    const int64_t queries = a->H / a->K * a->T, part = chunk % few->parts, slice = chunk / few->parts % few->slices;
    const int64_t heads = chunk / few->parts / few->slices, head = heads % a->K, b = heads / a->K;
    const int64_t first = queries * part / few->parts, last = queries * (part + 1) / few->parts, seen = few->seen[b];
    const int64_t begin = a->D / VL * slice / few->slices * VL, end = a->D / VL * (slice + 1) / few->slices * VL;
    const Slots slots = values_of(a, b, head);
    const float *scores = scores_of(a, b, head, 0);
    float *rows[MANY_QUERIES];
    for (int64_t i = first; i < last; i++) {
        rows[i] = query_row(a->out, a, b, head, i);
        memset(rows[i] + begin, 0, (size_t)(end - begin) * sizeof(float));
    }
    for (int64_t s = 0; s < seen; s += MIXED_KEYS) {
        const int64_t stop = s + MIXED_KEYS < seen ? s + MIXED_KEYS : seen;
        for (int64_t i = first, count; i < last; i += count) {
            const int fits_wide = REGISTERS == 32 || last - first <= 3; /* more sums than that are not in registers */
            const int64_t ahead = i == first && stop + MIXED_KEYS <= seen ? MIXED_KEYS : 0, apart = a->padded_keys;
            const float *weights = scores + i * apart;
            count = next_part(last - i, MAX_QUERIES);
            int64_t d = begin;
            for (; fits_wide && d + 4 * VL <= end; d += 4 * VL)
                WITH_COUNT(count, MIX_WIDE, weights, apart, rows + i, &slots, s, stop, ahead, d)
            for (; d + 2 * VL <= end; d += 2 * VL)
                WITH_COUNT(count, MIX_NARROW, weights, apart, rows + i, &slots, s, stop, ahead, d)
            for (; d < end; d += VL) WITH_COUNT(count, MIX_ONE, weights, apart, rows + i, &slots, s, stop, ahead, d)
        }
    }
    for (int64_t i = first; i < last; i++) {
        const VF total = vf_max(vf_set1(few->totals[(b * a->K + head) * queries + i]), vf_set1(1e-30f));
        for (int64_t d = begin; d < end; d += VL) vf_store(rows[i] + d, vf_div(vf_load(rows[i] + d), total));
    }
}

/* Divides values into slices, and queries into parts where those are too few for all threads. */
static void divide(FewQueries *few) {
    const Attention *a = few->a;
    const int64_t heads = a->B * a->K, queries = a->H / a->K * a->T, wanted = 2 * num_active_threads();
    const int64_t most_slices = a->D >= 2 * VL ? a->D / (2 * VL) : 1, most_parts = (queries + MAX_QUERIES - 1) / MAX_QUERIES;
    few->slices = few->parts = 1;
    if (wanted == 2) return;
    while (few->slices < most_slices && heads * few->slices < wanted) few->slices *= 2;
    if (few->slices > most_slices) few->slices = most_slices;
    while (few->parts < most_parts && heads * few->slices * few->parts < wanted) few->parts++;
}

#include "tiles.h"

/* The texts of a forward that have few queries: each has some chunks of every stage. */
enum { SCORING, WEIGHING, MIXING, STAGES };
typedef struct {
    FewQueries *few;
    int64_t count, *firsts[STAGES]; /* [count + 1] */
} FewOfMany;

static FewQueries *find_text(const FewOfMany *texts, int stage, int *chunk) {
    const int64_t *firsts = texts->firsts[stage];
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
    FewQueries *few = find_text(context, SCORING, &chunk);
    score_chunk(few, chunk);
}

TARGET static void weigh_text_chunk(void *context, int chunk) {
    FewQueries *few = find_text(context, WEIGHING, &chunk);
    weigh_chunk(few, chunk);
}

TARGET static void mix_text_chunk(void *context, int chunk) {
    FewQueries *few = find_text(context, MIXING, &chunk);
    mix_chunk(few, chunk);
}

/* Gets a text of few queries ready; counts its chunks. */
static void add_text(FewOfMany *texts, Attention *a) {
    const int64_t queries = a->H / a->K * a->T, heads = a->B * a->K;
    a->padded_keys = (a->S + SCORED_KEYS - 1) / SCORED_KEYS * SCORED_KEYS + 16; /* rows in other lines of a cache */
    a->scores = take((size_t)(heads * queries * a->padded_keys) * sizeof(float));
    int64_t *seen = take((size_t)a->B * sizeof(int64_t));
    for (int64_t b = 0; b < a->B; b++) seen[b] = seen_in_row(a, b);
    FewQueries *few = texts->few + texts->count;
    *few = (FewQueries){.a = a, .seen = seen, .totals = take((size_t)(heads * queries) * sizeof(float))};
    divide(few);
    const int64_t counts[STAGES] = {heads * ((a->S + KEY_BLOCK - 1) / KEY_BLOCK),
                                    heads * ((queries + VL - 1) / VL),
                                    heads * few->slices * few->parts};
    for (int stage = 0; stage < STAGES; stage++)
        texts->firsts[stage][texts->count + 1] = texts->firsts[stage][texts->count] + counts[stage];
    texts->count++;
}

/* All that is to be attended to in a layer: texts of many queries one by one, the others side by side. */
static void attend_all(Attention *attentions, int64_t count) {
    FewOfMany texts = {.few = take((size_t)count * sizeof(FewQueries))};
    for (int stage = 0; stage < STAGES; stage++) {
        texts.firsts[stage] = take((size_t)(count + 1) * sizeof(int64_t));
        texts.firsts[stage][0] = 0;
    }
    for (int64_t i = 0; i < count; i++)
        if (attentions[i].H / attentions[i].K * attentions[i].T >= MANY_QUERIES)
            attend_in_tiles(attentions + i);
        else
            add_text(&texts, attentions + i);
    if (!texts.count) return;
    parallel_for(score_text_chunk, &texts, (int)texts.firsts[SCORING][texts.count]);
    parallel_for(weigh_text_chunk, &texts, (int)texts.firsts[WEIGHING][texts.count]);
    parallel_for(mix_text_chunk, &texts, (int)texts.firsts[MIXING][texts.count]);
}

static void attend(Attention *a) { attend_all(a, 1); }
