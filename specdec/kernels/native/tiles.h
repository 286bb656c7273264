/* Attention of many queries, as attention.h has it of few: it includes this file. */

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
    Slots keys, values;
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
    const int64_t D = tile->a->D, stride = tile->keys.stride;
    const float *queries = tile->scratch.queries, *keys = slot_at(&tile->keys, s);
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
    for (int64_t i = s, stop; i < end;) {
        stop = run_end(&tile->keys, i, end);
        for (; i + KEYS_AT_ONCE <= stop; i += KEYS_AT_ONCE) score_keys(KEYS_AT_ONCE, tile, i);
        for (; i + 4 <= stop; i += 4) score_keys(4, tile, i);
        for (; i < stop; i++) score_keys(1, tile, i);
    }
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
    const int64_t D = tile->a->D;
    float *mixed = tile->scratch.mixed + lane * D + d;
    VF acc[MIX_LANES][2];
    for (int i = 0; i < MIX_LANES; i++)
        for (int j = 0; j < 2; j++) acc[i][j] = vf_load(mixed + i * D + j * VL);
    for (int64_t stop; s < end;) {
        const float *values = slot_at(&tile->values, s) + d;
        stop = run_end(&tile->values, s, end);
        for (; s < stop; s++, values += tile->values.stride) {
            const float *weights = tile->scratch.weights + s * LANES + lane;
            VF low = vf_load(values), high = vf_load(values + VL);
            for (int i = 0; i < MIX_LANES; i++) {
                VF weight = vf_set1(weights[i]);
                acc[i][0] = vf_fma(weight, low, acc[i][0]);
                acc[i][1] = vf_fma(weight, high, acc[i][1]);
            }
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
    tile.keys = keys_of(a, b, head);
    tile.values = values_of(a, b, head);
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
