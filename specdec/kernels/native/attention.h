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
    const float *k = a->k + b * a->k_strides[0] + head * a->k_strides[1];
    const int64_t end = (block + 1) * KEY_BLOCK < few->seen[b] ? (block + 1) * KEY_BLOCK : few->seen[b];
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
                        const float *v, int64_t d) {
    const Attention *a = few->a;
    const float *weights[MAX_QUERIES];
    VF acc[MAX_QUERIES][4], sum[MAX_QUERIES];
    for (int i = 0; i < count; i++) {
        weights[i] = scores_of(a, b, h0 + (first + i) / a->T, (first + i) % a->T);
        sum[i] = vf_zero();
        for (int j = 0; j < width; j++) acc[i][j] = vf_zero();
    }
    for (int64_t s = 0; s < few->seen[b]; s++) {
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
    const FewQueries *few = context;
    const Attention *a = few->a;
    const int64_t group = a->H / a->K, queries = group * a->T, tiles = (queries + MIX_QUERIES - 1) / MIX_QUERIES;
    const int64_t first = chunk % tiles * MIX_QUERIES, head = chunk / tiles % a->K, b = chunk / tiles / a->K;
    const float *v = a->v + b * a->v_strides[0] + head * a->v_strides[1];
    const int64_t count = queries - first < MIX_QUERIES ? queries - first : MIX_QUERIES;
    for (int64_t i = first; i < first + count; i++) weigh(a, few->seen[b], b, head * group + i / a->T, i % a->T);
    const int width = REGISTERS == 32 ? 4 : 2;
    for (int64_t d = 0; d < a->D;) {
        const int wide = d + width * VL <= a->D;
        int64_t i = 0;
        for (; wide && i + 4 <= count; i += 4) mix_queries(4, width, few, b, head * group, first + i, v, d);
        for (; wide && i + 2 <= count; i += 2) mix_queries(2, width, few, b, head * group, first + i, v, d);
        for (; wide && i < count; i++) mix_queries(1, width, few, b, head * group, first + i, v, d);
        for (; !wide && i < count; i++) mix_queries(1, 1, few, b, head * group, first + i, v, d);
        d += wide ? width * VL : VL;
    }
}

/* ---- many queries: tiles of them, one a lane, whose scores stay in the cache ---- */

#define LANES (2 * VL)
#define KEYS_AT_ONCE (REGISTERS == 32 ? 12 : 6) /* as many accumulators as there are registers for */
#define TILE_KEYS 96                     /* keys whose scores and values are at hand at once; a multiple of those */
#define MIX_LANES (REGISTERS / 4)         /* queries that one inner loop mixes values for */

/* What a thread needs for a tile; each has one at a time. Weights are scores before. */
typedef struct {
    float *queries; /* [2][D][VL] */
    float *weights; /* [S][LANES] */
    float *mixed;   /* [LANES][D] */
} TileScratch;

typedef struct {
    const Attention *a;
    float *scratch;
    int64_t scratch_size; /* floats of a thread */
    uint64_t used; /* a bit for each part of the scratch memory that a thread has */
} QueryTiles;

/* Up to LANES queries of one key/value head. Lanes from `count` on repeat the last query. */
typedef struct {
    const Attention *a;
    TileScratch scratch;
    const float *k, *v;
    int64_t b, heads[LANES], tokens[LANES];
    int count;
    int64_t seen;     /* keys from here on are hidden from all */
    int64_t all_seen; /* keys before are hidden from none */
} QueryTile;

static int begin_tile(QueryTiles *tiles) {
    uint64_t used = __atomic_load_n(&tiles->used, __ATOMIC_RELAXED);
    int part;
    do part = __builtin_ctzll(~used);
    while (!__atomic_compare_exchange_n(&tiles->used, &used, used | 1ull << part, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED));
    return part;
}

static void end_tile(QueryTiles *tiles, int part) {
    __atomic_fetch_and(&tiles->used, ~(1ull << part), __ATOMIC_RELEASE);
}

INLINE int64_t mask_offset(const QueryTile *tile, int lane) {
    const int64_t *strides = tile->a->mask_strides;
    return tile->b * strides[0] + tile->heads[lane] * strides[1] + tile->tokens[lane] * strides[2];
}

/* Finds what a tile's queries see: no key of a float mask is known to be hidden. */
TARGET static void look(QueryTile *tile) {
    const Attention *a = tile->a;
    tile->seen = 0;
    tile->all_seen = a->mask && !a->mask_is_bool ? 0 : a->S;
    for (int lane = 0; lane < tile->count; lane++) {
        int64_t seen = a->S, all_seen = tile->all_seen;
        if (!a->mask) {
            seen = all_seen = a->S - a->T + tile->tokens[lane] + 1;
        } else if (a->mask_is_bool) {
            const uint8_t *bytes = (const uint8_t *)a->mask + mask_offset(tile, lane);
            const uint8_t *hidden = memchr(bytes, 0, (size_t)a->S);
            if (hidden) all_seen = hidden - bytes;
            seen = without_zeros_at_end(bytes, a->S);
        }
        if (seen > tile->seen) tile->seen = seen;
        if (all_seen < tile->all_seen) tile->all_seen = all_seen;
    }
}

/* Dot products of the tile's queries with `count` keys. */
INLINE void score_keys(const int count, const QueryTile *tile, int64_t s) {
    const int64_t D = tile->a->D, stride = tile->a->k_strides[2];
    const float *queries = tile->scratch.queries, *keys = tile->k + s * stride;
    VF acc[KEYS_AT_ONCE][2];
    for (int i = 0; i < count; i++) acc[i][0] = acc[i][1] = vf_zero();
    for (int64_t d = 0; d < D; d++) {
        VF low = vf_load(queries + d * VL), high = vf_load(queries + (D + d) * VL);
        for (int i = 0; i < count; i++) {
            VF key = vf_set1(keys[i * stride + d]);
            acc[i][0] = vf_fma(low, key, acc[i][0]);
            acc[i][1] = vf_fma(high, key, acc[i][1]);
        }
    }
    for (int i = 0; i < count; i++)
        for (int j = 0; j < 2; j++) vf_store(tile->scratch.weights + (s + i) * LANES + j * VL, acc[i][j]);
}

/* A scaled score of VL queries, as one of them sees the key: -inf if it does not. */
INLINE VF masked(const QueryTile *tile, VF score, int64_t s, int first_lane) {
    const Attention *a = tile->a;
    uint8_t bytes[VL];
    float bias[VL];
    for (int i = 0; i < VL; i++) {
        const int lane = first_lane + i;
        const int64_t place = mask_offset(tile, lane) + s;
        if (!a->mask)
            bytes[i] = s < a->S - a->T + tile->tokens[lane] + 1;
        else if (a->mask_is_bool)
            bytes[i] = ((const uint8_t *)a->mask)[place];
        else
            bias[i] = ((const float *)a->mask)[place];
    }
    return a->mask && !a->mask_is_bool ? vf_add(score, vf_load(bias)) : vf_mask_bytes(score, bytes);
}

/* Scores of the keys [s, end), scaled and masked; raises each query's maximum. */
INLINE void score_tile(const QueryTile *tile, int64_t s, int64_t end, VF *highest) {
    int64_t i = s;
    for (; i + KEYS_AT_ONCE <= end; i += KEYS_AT_ONCE) score_keys(KEYS_AT_ONCE, tile, i);
    for (; i + 2 <= end; i += 2) score_keys(2, tile, i);
    for (; i < end; i++) score_keys(1, tile, i);
    for (; s < end; s++)
        for (int j = 0; j < 2; j++) {
            float *score = tile->scratch.weights + s * LANES + j * VL;
            VF v = vf_mul(vf_load(score), vf_set1(tile->a->scale));
            if (s >= tile->all_seen) v = masked(tile, v, s, j * VL);
            vf_store(score, v);
            highest[j] = vf_max(highest[j], v);
        }
}

/* mixed += weights @ values over the keys [s, end), for MIX_LANES queries from `lane` on and two vectors of d. */
INLINE void mix_keys(const QueryTile *tile, int64_t s, int64_t end, int lane, int64_t d) {
    const int64_t stride = tile->a->v_strides[2], D = tile->a->D;
    float *mixed = tile->scratch.mixed + lane * D + d;
    VF acc[MIX_LANES][2];
    for (int i = 0; i < MIX_LANES; i++)
        for (int j = 0; j < 2; j++) acc[i][j] = vf_load(mixed + i * D + j * VL);
    for (; s < end; s++) {
        const float *weights = tile->scratch.weights + s * LANES + lane, *values = tile->v + s * stride + d;
        VF low = vf_load(values), high = vf_load(values + VL);
        for (int i = 0; i < MIX_LANES; i++) {
            VF weight = vf_set1(weights[i]);
            acc[i][0] = vf_fma(weight, low, acc[i][0]);
            acc[i][1] = vf_fma(weight, high, acc[i][1]);
        }
    }
    for (int i = 0; i < MIX_LANES; i++)
        for (int j = 0; j < 2; j++) vf_store(mixed + i * D + j * VL, acc[i][j]);
}

/* Scores of the keys [s, end) -> weights, whose sums grow, and their share of the values. */
INLINE void mix_tile(const QueryTile *tile, int64_t s, int64_t end, const VF *highest, VF *sums) {
    for (int64_t i = s; i < end; i++)
        for (int j = 0; j < 2; j++) {
            float *weights = tile->scratch.weights + i * LANES + j * VL;
            VF weight = vf_exp(vf_sub(vf_load(weights), highest[j]));
            vf_store(weights, weight);
            sums[j] = vf_add(sums[j], weight);
        }
    for (int lane = 0; lane < tile->count; lane += MIX_LANES)
        for (int64_t d = 0; d < tile->a->D; d += 2 * VL) mix_keys(tile, s, end, lane, d);
}

TARGET static __attribute__((noinline)) void attend_tile(QueryTile *tile) {
    const Attention *a = tile->a;
    const TileScratch *scratch = &tile->scratch;
    const float *queries[LANES];
    for (int lane = 0; lane < LANES; lane++)
        queries[lane] = a->q + ((tile->b * a->T + tile->tokens[lane]) * a->H + tile->heads[lane]) * a->D;
    for (int j = 0; j < 2; j++)
        for (int64_t d = 0; d < a->D; d += 4) transpose4(queries + j * VL, d, scratch->queries + (j * a->D + d) * VL);
    memset(scratch->mixed, 0, (size_t)(LANES * a->D) * sizeof(float));
    look(tile);

    /* A query that sees nothing has -inf for all keys: less something finite, that gets weight 0. */
    VF highest[2] = {vf_set1(-FLT_MAX), vf_set1(-FLT_MAX)}, sums[2] = {vf_zero(), vf_zero()};
    for (int64_t s = 0; s < tile->seen; s += TILE_KEYS)
        score_tile(tile, s, s + TILE_KEYS < tile->seen ? s + TILE_KEYS : tile->seen, highest);
    for (int64_t s = 0; s < tile->seen; s += TILE_KEYS)
        mix_tile(tile, s, s + TILE_KEYS < tile->seen ? s + TILE_KEYS : tile->seen, highest, sums);

    float totals[LANES];
    for (int j = 0; j < 2; j++) vf_store(totals + j * VL, vf_max(sums[j], vf_set1(1e-30f)));
    for (int lane = 0; lane < tile->count; lane++) {
        float *out = a->out + ((tile->b * a->T + tile->tokens[lane]) * a->H + tile->heads[lane]) * a->D;
        for (int64_t d = 0; d < a->D; d += VL)
            vf_store(out + d, vf_div(vf_load(scratch->mixed + lane * a->D + d), vf_set1(totals[lane])));
    }
}

TARGET static void tile_chunk(void *context, int chunk) {
    QueryTiles *tiles = context;
    const Attention *a = tiles->a;
    const int64_t group = a->H / a->K, queries = group * a->T, per_head = (queries + LANES - 1) / LANES;
    const int64_t first = chunk % per_head * LANES, head = chunk / per_head % a->K, b = chunk / per_head / a->K;
    const int part = begin_tile(tiles);
    float *scratch = tiles->scratch + part * tiles->scratch_size;
    QueryTile tile = {.a = a, .b = b, .count = (int)(queries - first < LANES ? queries - first : LANES)};
    tile.k = a->k + b * a->k_strides[0] + head * a->k_strides[1];
    tile.v = a->v + b * a->v_strides[0] + head * a->v_strides[1];
    tile.scratch = (TileScratch){scratch, scratch + 2 * LANES * a->D, scratch + LANES * a->D};
    for (int lane = 0; lane < LANES; lane++) {
        const int64_t i = first + (lane < tile.count ? lane : tile.count - 1);
        tile.heads[lane] = head * group + i / a->T;
        tile.tokens[lane] = i % a->T;
    }
    attend_tile(&tile);
    end_tile(tiles, part);
}

static void attend_in_tiles(Attention *a) {
    QueryTiles tiles = {.a = a, .scratch_size = LANES * (2 * a->D + a->S)};
    tiles.scratch = take((size_t)(num_active_threads() * tiles.scratch_size) * sizeof(float));
    const int64_t per_head = (a->H / a->K * a->T + LANES - 1) / LANES;
    parallel_for(tile_chunk, &tiles, (int)(a->B * a->K * per_head));
}

static void attend(Attention *a) {
    if (a->H / a->K * a->T >= MANY_QUERIES) {
        attend_in_tiles(a);
        return;
    }
    a->padded_keys = (a->S + VL - 1) / VL * VL;
    a->scores = take((size_t)(a->B * a->H * a->T * a->padded_keys) * sizeof(float));
    const int64_t blocks = (a->padded_keys + KEY_BLOCK - 1) / KEY_BLOCK;
    const int64_t tiles = (a->H / a->K * a->T + MIX_QUERIES - 1) / MIX_QUERIES;
    int64_t *seen = take((size_t)a->B * sizeof(int64_t));
    for (int64_t b = 0; b < a->B; b++) seen[b] = seen_in_row(a, b);
    FewQueries few = {a, seen};
    parallel_for(score_chunk, &few, (int)(a->B * a->K * blocks));
    parallel_for(mix_chunk, &few, (int)(a->B * a->K * tiles));
}
