/* Products of a few rows with a big weight matrix: out[m][n] = sum_k x[m][k] w[n][k].
 *
 * The weights are streamed from memory once, whatever the number of rows, and every (m, n) is summed in one fixed
 * order: each row is bit-identical whatever the batch. While one strip of weights is in use the next is fetched: the
 * hardware's own prefetching stops at every page.
 *
 * float32 weights stay as torch stores them, [n][k], and so do those of 16 bits (bfloat16): their product is that of the
 * same weights in float32, to the bit.
 * int8 weights are packed in blocks of 16 outputs, [n/16][k/4][16][4], n and k padded with zeros to multiples of 64;
 * one float scale per output. int8 rows come in tiles of up to 8, interleaved as [k/4][rows][4], or in wide ones of
 * always 16 (rows that are not there have scale 0), as [k/64][16][64]; with a float scale and an integer sum per (group,
 * row), where weights have scales of their own a scale per half a group. Sums are exact integers within a group; groups are added in float32, in order: the same bits by either way.
 * 4-bit weights are codes of 0..15 with a scale and an offset for every 32 inputs of an output: weight = code * scale +
 * offset. They are packed in blocks of 16 outputs too, [n/16][k/64] of GROUP4_BYTES: scales [2][16] and offsets [2][16],
 * both float16, then [2][4][16][4] bytes. Byte [half][j][output][i] holds input 32 * half + 4 * j + i in its low four
 * bits and the one 16 further in the high ones. Rows are quantised as for int8, and half a group gives
 * row scale * (scale * sum(code * q) + offset * sum(q)), with exact integer sums; halves are added in float32, in order.
 * Weights in bytes are codes too, of GGUF's blocks: [n/16][k/64] of GROUPED_BYTES, which are 64 float16 numbers and then
 * [16][16][4] codes, of groups as int8 has them. BYTES5: codes of 0..31, scales [2][16] and offsets [2][16], as for 4
 * bits. BYTES6 and BYTES8: codes of 0..63 and 0..255, of which 32 and 128 are zero, and scales [4][16], one for every 16
 * inputs: each of them gives row scale * (scale * sum((code - zero) * q)), with exact integer sums.
 * Weight-only products read the same packed weights and leave the rows in float32: a rounding upstream then stays a
 * rounding, where it could tip a quantised row to the next step. */

/* Where rows go after they are quantised: tiles of TILE or WIDE_TILE rows, each with room for `groups` groups. */
typedef struct {
    int64_t rows, k, groups, tile, scales_per_group; /* these: 1 or 2 */
    int8_t *q;
    float *scales;
    int32_t *totals; /* of each group, its sum */
    float *shares;   /* of each half of a group, its sum times its scale: of which 4-bit weights' offsets are multiples */
    int32_t *quarters; /* of each quarter of a group, its sum, negated */
} Quantized;

/* What becomes of a product: out = product * scale + bias (+ residual). */
typedef struct {
    const Matrix *matrix;
    const float *x;             /* [rows][k], for weights of 32 and 16 bits and weight-only products */
    const Quantized *quantized; /* for packed weights, NULL if weight-only; not read with weights of 32 or 16 bits */
    int64_t rows;
    float *out;
    const float *residual; /* NULL or [rows][n], added to the result */
} Product;

/* Rows that go over a strip of packed weights together, of so many. */
static int64_t tile_of(const Matrix *w, int64_t rows) {
#ifdef FEWEST_WIDE_ROWS
    if (w->bits == 8 && rows >= FEWEST_WIDE_ROWS) return WIDE_TILE;
#endif
    (void)w, (void)rows;
    return TILE;
}

INLINE void quantize_one(const Quantized *to, const float *x, int64_t row) {
    const int64_t first = row / to->tile * to->tile, left = to->tile == TILE ? to->rows - first : WIDE_TILE;
    const int rows = (int)(left < to->tile ? left : to->tile), m = (int)(row - first);
    const int step = to->tile == TILE ? 4 * rows : 4, place = to->tile == TILE ? 4 * m : GROUP * m;
    quantize_row(x, to->k, to->groups, to->scales_per_group, rows, step, to->q + first * to->groups * GROUP + place,
                 to->scales + to->scales_per_group * first * to->groups + m, to->totals + first * to->groups + m,
                 to->shares + 2 * first * to->groups + m, to->quarters + 4 * first * to->groups + m);
}

TARGET static __attribute__((noinline)) void finish(const Product *p, int64_t row, int64_t n, int64_t count,
                                                    const float *sums) {
    const Matrix *w = p->matrix;
    float *out = p->out + row * w->n + n;
    const float *residual = p->residual ? p->residual + row * w->n + n : NULL;
    for (int64_t i = 0; i < count; i++) { /* count <= 0 in the padding of the last strip */
        float value = w->scale ? sums[i] * w->scale[n + i] : sums[i];
        if (w->bias) value += w->bias[n + i];
        out[i] = residual ? residual[i] + value : value;
    }
}

/* Packed weights: `blocks` blocks of 16 outputs from block `block` on, against one tile of `rows` rows. */
INLINE void packed_tile(const int bits, const int blocks, const int rows, const int stride, const Product *p,
                        int64_t block, int64_t tile, int first) {
    const int64_t groups = p->quantized->groups, block_bytes = groups * group_bytes(bits);
    const int8_t *w = (const int8_t *)p->matrix->data + block * block_bytes;
    const int8_t *x = p->quantized->q + tile * groups * GROUP + 4 * first;
    const float *scales = p->quantized->scales + p->quantized->scales_per_group * tile * groups + first;
    const int32_t *totals = p->quantized->totals + tile * groups + first;
    const float *shares = p->quantized->shares + 2 * tile * groups + first;
    float sums[4 * TILE * 16] __attribute__((aligned(64)));
    for (int i = 0; i < blocks * rows * 16; i++) sums[i] = 0;
    for (int64_t g = 0; bits == 8 && g < groups; g++)
        dot_group(blocks, rows, stride, w + g * GROUP * 16, block_bytes, x + g * GROUP * stride, scales + g * stride,
                  totals + g * stride, sums);
    if (bits == 4) dot_groups4(blocks, rows, stride, w, block_bytes, groups, x, scales, shares, sums);
    if (bits == BYTES5 || bits == BYTES6 || bits == BYTES8)
        dot_bytes(bits, blocks, rows, stride, w, block_bytes, groups, x, scales, shares,
                  p->quantized->quarters + 4 * tile * groups + first, sums);
    for (int b = 0; b < blocks; b++) {
        const int64_t n = (block + b) * 16, left = p->matrix->n - n;
        for (int m = 0; m < rows; m++) finish(p, tile + first + m, n, left < 16 ? left : 16, sums + (b * rows + m) * 16);
    }
}

/* Weights in bytes: a function for each kind and number of rows, 1 to 4 with as many blocks as make four sums, and
 * BYTES_ROWS. */
typedef void (*BytesTile)(const Product *p, int64_t block, int stride, int64_t tile, int first);
#define BYTES_TILE(bits, rows)                                                                                         \
    TARGET static __attribute__((noinline)) void bits##_tile_##rows(const Product *p, int64_t block, int stride,       \
                                                                    int64_t tile, int first) {                         \
        packed_tile(bits, rows > 4 ? 1 : 4 / rows, rows, stride, p, block, tile, first);                               \
    }
#if BYTES_ROWS == 8
#define BYTES_TILE_8(bits) BYTES_TILE(bits, 8)
#define LARGEST_TILE(bits) bits##_tile_8
#else
#define BYTES_TILE_8(bits)
#define LARGEST_TILE(bits) bits##_tile_4
#endif
#define BYTES_TILES(bits) \
    BYTES_TILE(bits, 1) BYTES_TILE(bits, 2) BYTES_TILE(bits, 3) BYTES_TILE(bits, 4) BYTES_TILE_8(bits)
#define TILES_OF(bits) {bits##_tile_1, bits##_tile_2, bits##_tile_3, bits##_tile_4, LARGEST_TILE(bits)}
BYTES_TILES(BYTES5)
BYTES_TILES(BYTES6)
BYTES_TILES(BYTES8)

/* Weights in bytes: the four blocks of 16 outputs of a strip, against all rows. */
static void bytes_strip(const Product *p, int64_t block) {
    static const BytesTile tiles[3][5] = {TILES_OF(BYTES5), TILES_OF(BYTES6), TILES_OF(BYTES8)};
    const BytesTile *tile = tiles[p->matrix->bits == BYTES5 ? 0 : p->matrix->bits == BYTES6 ? 1 : 2];
    for (int64_t row = 0; row < p->rows; row += TILE) {
        const int rows = (int)(p->rows - row < TILE ? p->rows - row : TILE);
        for (int first = 0, count; first < rows; first += count) {
            count = rows - first >= BYTES_ROWS ? BYTES_ROWS : rows - first < 4 ? rows - first : 4;
            const int which = count < 4 ? count - 1 : count == 4 ? 3 : 4, step = count < 4 ? 4 / count : 1;
            for (int b = 0; b < 4; b += step) tile[which](p, block + b, rows, row, first);
        }
    }
}

#ifdef FEWEST_WIDE_ROWS
/* int8: the four blocks of 16 outputs of a strip, against the wide tile that begins with a row. */
INLINE void int8_wide_tile(const Product *p, int64_t block, int64_t row) {
    const int64_t groups = p->quantized->groups, block_bytes = groups * GROUP * 16, left = p->matrix->n - block * 16;
    const int8_t *w = (const int8_t *)p->matrix->data + block * block_bytes;
    float sums[WIDE_TILE * STRIP] __attribute__((aligned(64)));
    for (int b = 0; b < 4; b++) {
        const int8_t *next = row ? NULL : w + (b + 4) * block_bytes; /* later rows find theirs in the cache */
        dot_tiles(w + b * block_bytes, next, p->quantized->q + row * groups * GROUP,
                  p->quantized->scales + row * groups, groups, sums + 16 * b);
    }
    for (int64_t m = 0; m < WIDE_TILE && row + m < p->rows; m++)
        finish(p, row + m, block * 16, left < STRIP ? left : STRIP, sums + m * STRIP);
}

/* Outputs [n, end) of an int8 product over wide tiles. */
TARGET static void wide_outputs(const Product *p, int64_t n, int64_t end) {
    _tile_loadconfig(&all_tiles);
    for (; n < end; n += STRIP)
        for (int64_t row = 0; row < p->rows; row += WIDE_TILE) int8_wide_tile(p, n / 16, row);
    _tile_release();
}
#endif

#ifdef FEWEST_PAIRED_ROWS
#define PAIRED_ROWS 64  /* whose widened groups stay in the cache */
#define PAIRED_GROUPS 4 /* that are widened at once */

/* int8: a strip against `rows` rows, a multiple of TILE and at most PAIRED_ROWS, from `row` on. */
TARGET static __attribute__((noinline)) void paired_strip(const Product *p, int64_t n, int64_t row, int64_t rows) {
    const int64_t groups = p->quantized->groups, block_bytes = groups * GROUP * 16, left = p->matrix->n - n;
    const int8_t *w = (const int8_t *)p->matrix->data + n * groups * GROUP;
    int16_t weights[PAIRED_GROUPS * GROUP * 16] __attribute__((aligned(64)));
    int16_t x[PAIRED_ROWS / TILE][PAIRED_GROUPS * GROUP * TILE] __attribute__((aligned(64)));
    float sums[PAIRED_ROWS * STRIP] __attribute__((aligned(64)));
    memset(sums, 0, (size_t)(rows * STRIP) * sizeof(float));
    for (int64_t g = 0; g < groups; g += PAIRED_GROUPS) {
        const int64_t count = groups - g < PAIRED_GROUPS ? groups - g : PAIRED_GROUPS;
        for (int64_t m = 0; m < rows; m += TILE)
            widen(p->quantized->q + ((row + m) * groups + g * TILE) * GROUP, count * GROUP * TILE, x[m / TILE]);
        for (int b = 0; b < 4; b++) {
            widen(w + b * block_bytes + g * GROUP * 16, count * GROUP * 16, weights);
            for (int64_t m = 0; m < rows; m += 4)
                for (int64_t i = 0; i < count; i++) {
                    const int64_t tile = m / TILE, first = m % TILE;
                    dot_pairs(4, weights + i * GROUP * 16, x[tile] + i * GROUP * TILE + 2 * first,
                              p->quantized->scales + (row + tile * TILE) * groups + (g + i) * TILE + first,
                              sums + m * STRIP + b * 16);
                }
        }
    }
    for (int64_t m = 0; m < rows; m++) finish(p, row + m, n, left < STRIP ? left : STRIP, sums + m * STRIP);
}
#endif

/* The inputs beyond the last whole vector. */
TARGET static __attribute__((noinline)) float tail_product(int bits, const void *w, const float *x, int64_t count) {
    float sum = 0;
    for (int64_t i = 0; i < count; i++) {
        float weight;
        if (bits == 32) {
            weight = ((const float *)w)[i];
        } else {
            const uint32_t whole = (uint32_t)((const uint16_t *)w)[i] << 16;
            memcpy(&weight, &whole, sizeof weight);
        }
        sum += weight * x[i];
    }
    return sum;
}

/* Weights of 32 or 16 bits: `outputs` outputs from n on, against `rows` rows. */
INLINE void float_tile(const int bits, const int outputs, const int rows, const Product *p, int64_t n, int64_t first_row) {
    const int64_t k = p->matrix->k, bytes = bits / 8;
    const char *w = (const char *)p->matrix->data + n * k * bytes;
    const float *x = p->x + first_row * k;
    VF acc[6][4];
    for (int i = 0; i < outputs; i++)
        for (int m = 0; m < rows; m++) acc[i][m] = vf_zero();
    int64_t at = 0;
    for (; at + VL <= k; at += VL) {
        VF row[4];
        for (int m = 0; m < rows; m++) row[m] = vf_load(x + m * k + at);
        for (int i = 0; i < outputs; i++) {
            const char *weights = w + (i * k + at) * bytes;
            const VF weight = bits == 32 ? vf_load((const float *)weights) : vf_load_upper((const uint16_t *)weights);
            prefetch_l2(weights + outputs * k * bytes);
            for (int m = 0; m < rows; m++) acc[i][m] = vf_fma(weight, row[m], acc[i][m]);
        }
    }
    for (int m = 0; m < rows; m++) {
        float sums[6];
        for (int i = 0; i < outputs; i++) {
            sums[i] = vf_sum(acc[i][m]);
            if (at < k) sums[i] += tail_product(bits, w + (i * k + at) * bytes, x + m * k + at, k - at);
        }
        finish(p, first_row + m, n, outputs, sums);
    }
}

/* Weight-only, 4 bits: where the codes of four inputs from `at` on lie in a block. */
INLINE const int8_t *codes_of(const int8_t *group, int64_t at) {
    return group + 128 + at / 32 * 256 + at / 4 % 4 * 64;
}

/* Weight-only: `blocks` blocks of 16 outputs from block `block` on, against `rows` rows in float32. `bits`: 8, 4, or
 * BYTES5 for all that are in bytes with scales among them. Every output is one
 * chain of additions over the inputs, in order. */
INLINE void weight_only_tile(const int bits, const int blocks, const int rows, const Product *p, int64_t block,
                             int64_t first_row) {
    enum { PARTS = 16 / VL };
    const int64_t k = p->matrix->k, step = group_bytes(bits), block_bytes = (k + GROUP - 1) / GROUP * step;
    const int has_offsets = p->matrix->bits == 4 || p->matrix->bits == BYTES5, share = has_offsets ? 32 : 16;
    const VF minus_zero = vf_set1(p->matrix->bits == BYTES6 ? -32.0f : -128.0f);
    const int8_t *w = (const int8_t *)p->matrix->data + block * block_bytes;
    const float *x = p->x + first_row * k;
    VF acc[4][4][PARTS];
    for (int b = 0; b < blocks; b++)
        for (int m = 0; m < rows; m++)
            for (int h = 0; h < PARTS; h++) acc[b][m][h] = vf_zero();
    for (int64_t at = 0; at < k; at += 4) {
        const int64_t left = k - at;
        VI bytes[4][PARTS];
        VF scale[4][PARTS], offset[4][PARTS];
        for (int b = 0; b < blocks; b++)
            for (int h = 0; h < PARTS; h++) {
                const int8_t *group = w + b * block_bytes + at / GROUP * step;
                const int64_t in_group = at % GROUP;
                const int8_t *weights = bits == 4 ? codes_of(group, in_group)
                                                  : group + (bits == 8 ? 0 : 128) + 16 * in_group;
                weights += 4 * VL * h;
                bytes[b][h] = vi_load(weights);
                prefetch_l2(weights + 4 * block_bytes);
                if (bits == 8) continue;
                if (bits == 4 && in_group / 16 % 2) bytes[b][h] = vi_high_codes(bytes[b][h]);
                scale[b][h] = vf_load_half(group + in_group / share * 32 + 2 * VL * h);
                offset[b][h] = has_offsets ? vf_load_half(group + 64 + in_group / share * 32 + 2 * VL * h)
                                           : vf_mul(scale[b][h], minus_zero);
            }
#define WEIGHT_ONLY_INPUT(j)                                                               \
    if (j < left) {                                                                        \
        VF row[4];                                                                         \
        for (int m = 0; m < rows; m++) row[m] = vf_set1(x[m * k + at + j]);                \
        for (int b = 0; b < blocks; b++)                                                   \
            for (int h = 0; h < PARTS; h++) {                                              \
                const VF weight =                                                          \
                    bits == 8 ? vf_from_int(vi_byte(bytes[b][h], j))                       \
                              : vf_fma(vf_from_int(bits == 4 ? vi_code(bytes[b][h], j)                      \
                                                             : vi_unsigned_byte(bytes[b][h], j)),           \
                                       scale[b][h], offset[b][h]);                                          \
                for (int m = 0; m < rows; m++) acc[b][m][h] = vf_fma(weight, row[m], acc[b][m][h]); \
            }                                                                              \
    }
        WEIGHT_ONLY_INPUT(0)
        WEIGHT_ONLY_INPUT(1)
        WEIGHT_ONLY_INPUT(2)
        WEIGHT_ONLY_INPUT(3)
    }
    for (int b = 0; b < blocks; b++) {
        const int64_t n = (block + b) * 16, left = p->matrix->n - n;
        for (int m = 0; m < rows; m++) {
            float sums[16] __attribute__((aligned(64)));
            for (int h = 0; h < PARTS; h++) vf_store(sums + VL * h, acc[b][m][h]);
            finish(p, first_row + m, n, left < 16 ? left : 16, sums);
        }
    }
}

#define EACH_TILE(size, last, CASES)                                               \
    for (; row < (last); row += size) switch ((last)-row < size ? (last)-row : size) { \
            CASES                                                                      \
        }
#define UP_TO_4(M) M(1) M(2) M(3) M(4)
#define UP_TO_8(M) UP_TO_4(M) M(5) M(6) M(7) M(8)

#define FLOAT_ROWS 24 /* that pass over a chunk of weights together */

/* `outputs` outputs from n on, for the rows [row, last). */
INLINE void float_rows(const int outputs, const Product *p, int64_t n, int64_t row, int64_t last) {
#define FLOAT_TILE_32(r) \
    case r: float_tile(32, outputs, r, p, n, row); break;
#define FLOAT_TILE_16(r) \
    case r: float_tile(16, outputs, r, p, n, row); break;
    if (p->matrix->bits == 32) {
        EACH_TILE(4, last, UP_TO_4(FLOAT_TILE_32))
    } else {
        EACH_TILE(4, last, UP_TO_4(FLOAT_TILE_16))
    }
}

/* Outputs [n, end) of a product of weights of 32 or 16 bits. Some rows at a time, which stay in the cache. */
TARGET static void float_outputs(const Product *p, int64_t n, int64_t end) {
    for (int64_t row = 0; row < p->rows; row += FLOAT_ROWS) {
        const int64_t last = row + FLOAT_ROWS < p->rows ? row + FLOAT_ROWS : p->rows;
        int64_t at = n;
        for (; REGISTERS == 32 && at + 6 <= end; at += 6) float_rows(6, p, at, row, last);
        for (; at + 2 <= end; at += 2) float_rows(2, p, at, row, last);
        for (; at < end; at++) float_rows(1, p, at, row, last);
    }
}

/* Outputs [n, end) of a product, for all rows; n is a multiple of STRIP, and `end` too unless it is the last output. */
TARGET static void outputs(const Product *p, int64_t n, int64_t end) {
#ifdef FEWEST_WIDE_ROWS
    if (p->matrix->bits == 8 && p->quantized && p->quantized->tile == WIDE_TILE) {
        wide_outputs(p, n, end);
        return;
    }
#endif
    if (p->matrix->bits < 16 && !p->quantized) {
        for (; n < end; n += STRIP) {
            const int64_t block = n / 16;
#define WEIGHT_ONLY_STRIP(bits, r)                                                  \
    case r:                                                                         \
        for (int part = 0; part < 4; part += WEIGHT_ONLY_BLOCKS(r))                 \
            weight_only_tile(bits, WEIGHT_ONLY_BLOCKS(r), r, p, block + part, row); \
        break;
#define WEIGHT_ONLY_STRIP_8(r) WEIGHT_ONLY_STRIP(8, r)
#define WEIGHT_ONLY_STRIP_4(r) WEIGHT_ONLY_STRIP(4, r)
#define WEIGHT_ONLY_STRIP_BYTES(r) WEIGHT_ONLY_STRIP(BYTES5, r)
            int64_t row = 0;
            if (p->matrix->bits == 8) {
                EACH_TILE(4, p->rows, UP_TO_4(WEIGHT_ONLY_STRIP_8))
            } else if (p->matrix->bits == 4) {
                EACH_TILE(4, p->rows, UP_TO_4(WEIGHT_ONLY_STRIP_4))
            } else {
                EACH_TILE(4, p->rows, UP_TO_4(WEIGHT_ONLY_STRIP_BYTES))
            }
        }
    } else if (p->matrix->bits < 16) {
        for (; n < end; n += STRIP) {
            const int64_t block = n / 16;
#define PACKED_STRIP(bits, most, r)                                                                      \
    case r:                                                                                              \
        if (4 * r <= most) {                                                                             \
            packed_tile(bits, 4, r, r, p, block, row, 0);                                                \
        } else if (2 * r <= most) {                                                                      \
            for (int half = 0; half < 4; half += 2) packed_tile(bits, 2, r, r, p, block + half, row, 0); \
        } else {                                                                                         \
            for (int b = 0; b < 4; b++) {                                                                \
                packed_tile(bits, 1, r < most ? r : most, r, p, block + b, row, 0);                      \
                if (r > most) packed_tile(bits, 1, r - most, r, p, block + b, row, most);                \
            }                                                                                            \
        }                                                                                                \
        break;
#define INT8_STRIP(r) PACKED_STRIP(8, INT8_ACC, r)
#define INT4_STRIP(r) PACKED_STRIP(4, INT4_ACC, r)
            int64_t row = 0;
            if (p->matrix->bits == 4) {
                EACH_TILE(TILE, p->rows, UP_TO_8(INT4_STRIP))
                continue;
            }
            if (p->matrix->bits != 8) {
                bytes_strip(p, block);
                continue;
            }
#ifdef FEWEST_PAIRED_ROWS
            for (int64_t count; p->rows >= FEWEST_PAIRED_ROWS && (count = (p->rows - row) / TILE * TILE); row += count) {
                if (count > PAIRED_ROWS) count = PAIRED_ROWS;
                paired_strip(p, n, row, count);
            }
#endif
            EACH_TILE(TILE, p->rows, UP_TO_8(INT8_STRIP))
        }
    } else {
        float_outputs(p, n, end);
    }
}
