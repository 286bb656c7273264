/* Attention of a few queries over a long, strided key/value cache, with an arbitrary mask.
 *
 * Query heads that share a key/value head are served together, so keys and values are read once per group. Scores are
 * summed over d in order, weights and values over keys in order, and a hidden key contributes exactly nothing: a
 * query's result depends only on the sequence of keys it sees, not on where they lie or who else is asking. That
 * makes a token verified in a tree bit-identical to the same token decoded alone. */

#define KEY_BLOCK 64
#define MAX_QUERIES 6 /* that one inner loop serves */
#define MAX_HEAD_DIM 256

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
    const Attention *a = context;
    const int64_t blocks = (a->padded_keys + KEY_BLOCK - 1) / KEY_BLOCK, group = a->H / a->K;
    const int64_t block = chunk % blocks, head = chunk / blocks % a->K, b = chunk / blocks / a->K;
    const float *k = a->k + b * a->k_strides[0] + head * a->k_strides[1];
    const int64_t end = (block + 1) * KEY_BLOCK < a->padded_keys ? (block + 1) * KEY_BLOCK : a->padded_keys;
    float keys[MAX_HEAD_DIM * VL] __attribute__((aligned(64)));
    for (int64_t s = block * KEY_BLOCK; s < end; s += VL) {
        const float *rows[VL];
        for (int r = 0; r < VL; r++) rows[r] = k + (s + r < a->S ? s + r : a->S - 1) * a->k_strides[2];
        for (int64_t d = 0; d < a->D; d += 4) transpose4(rows, d, keys + d * VL);
        int64_t i = 0;
        for (; i + 6 <= group * a->T; i += 6) score_queries(6, a, b, head * group, i, s, keys);
        for (; i + 2 <= group * a->T; i += 2) score_queries(2, a, b, head * group, i, s, keys);
        for (; i < group * a->T; i++) score_queries(1, a, b, head * group, i, s, keys);
    }
}

/* scores -> exp(scaled, masked score - maximum), zero beyond the last visible key. */
INLINE void weigh(const Attention *a, int64_t b, int64_t h, int64_t t) {
    float *scores = scores_of(a, b, h, t);
    const int64_t offset = b * a->mask_strides[0] + h * a->mask_strides[1] + t * a->mask_strides[2];
    const int64_t visible = a->mask ? a->S : a->S - a->T + t + 1;
    VF highest = vf_set1(-INFINITY);
    for (int64_t s = 0; s < a->padded_keys; s += VL) {
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
        memset(scores, 0, (size_t)a->padded_keys * sizeof(float));
        return;
    }
    for (int64_t s = 0; s < a->padded_keys; s += VL)
        vf_store(scores + s, vf_exp(vf_sub(vf_load(scores + s), vf_set1(maximum))));
}

/* out = weights @ values / sum(weights) for `count` queries of one key/value head, `width` vectors of d at a time. */
INLINE void mix_queries(const int count, const int width, const Attention *a, int64_t b, int64_t h0, int64_t first,
                        const float *v, int64_t d) {
    const float *weights[MAX_QUERIES];
    VF acc[MAX_QUERIES][4], sum[MAX_QUERIES];
    for (int i = 0; i < count; i++) {
        weights[i] = scores_of(a, b, h0 + (first + i) / a->T, (first + i) % a->T);
        sum[i] = vf_zero();
        for (int j = 0; j < width; j++) acc[i][j] = vf_zero();
    }
    for (int64_t s = 0; s < a->S; s++) {
        VF value[4];
        for (int j = 0; j < width; j++) value[j] = vf_load(v + s * a->v_strides[2] + d + j * VL);
        for (int i = 0; i < count; i++) {
            VF weight = vf_set1(weights[i][s]);
            sum[i] = vf_add(sum[i], weight);
            for (int j = 0; j < width; j++) acc[i][j] = vf_fma(weight, value[j], acc[i][j]);
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
    const Attention *a = context;
    const int64_t group = a->H / a->K, queries = group * a->T, tiles = (queries + MIX_QUERIES - 1) / MIX_QUERIES;
    const int64_t first = chunk % tiles * MIX_QUERIES, head = chunk / tiles % a->K, b = chunk / tiles / a->K;
    const float *v = a->v + b * a->v_strides[0] + head * a->v_strides[1];
    const int64_t count = queries - first < MIX_QUERIES ? queries - first : MIX_QUERIES;
    for (int64_t i = first; i < first + count; i++) weigh(a, b, head * group + i / a->T, i % a->T);
    const int width = VL == 16 ? 4 : 2;
    for (int64_t d = 0; d < a->D;) {
        const int wide = d + width * VL <= a->D;
        int64_t i = 0;
        for (; wide && i + 4 <= count; i += 4) mix_queries(4, width, a, b, head * group, first + i, v, d);
        for (; wide && i + 2 <= count; i += 2) mix_queries(2, width, a, b, head * group, first + i, v, d);
        for (; wide && i < count; i++) mix_queries(1, width, a, b, head * group, first + i, v, d);
        for (; !wide && i < count; i++) mix_queries(1, 1, a, b, head * group, first + i, v, d);
        d += wide ? width * VL : VL;
    }
}

static void attend(Attention *a) {
    a->padded_keys = (a->S + VL - 1) / VL * VL;
    a->scores = take((size_t)(a->B * a->H * a->T * a->padded_keys) * sizeof(float));
    const int64_t blocks = (a->padded_keys + KEY_BLOCK - 1) / KEY_BLOCK;
    const int64_t tiles = (a->H / a->K * a->T + MIX_QUERIES - 1) / MIX_QUERIES;
    parallel_for(score_chunk, a, a->B * a->K * blocks);
    parallel_for(mix_chunk, a, a->B * a->K * tiles);
}
