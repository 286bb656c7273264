/* The vector vocabulary of the kernels, 4 floats wide (NEON of AArch64). Same names as simd_avx2.h. With DOTPROD four
 * products of bytes and their sum take one instruction, with I8MM sixteen for two rows. */
#ifndef ALSO /* what the processor has besides */
#define ALSO
#endif
#define TARGET __attribute__((unused ALSO))
#define INLINE static inline __attribute__((always_inline ALSO))
#define VL 4
#define REGISTERS 32
#define INT8_ACC 4 /* sums, of which each has four accumulators, that stay in registers beside the operands */
#define INT4_ACC 4
#define BYTES_ROWS 4 /* that pass over weights in bytes together */
#define WEIGHT_ONLY_BLOCKS(rows) 1 /* blocks of 16 outputs whose sums do */

#define VF float32x4_t
#define VI int32x4_t
#define vf_zero() vdupq_n_f32(0)
#define vf_set1 vdupq_n_f32
#define vf_load vld1q_f32
#define vf_store vst1q_f32
#define vf_add vaddq_f32
#define vf_sub vsubq_f32
#define vf_mul vmulq_f32
#define vf_div vdivq_f32
#define vf_fma(a, b, c) vfmaq_f32(c, a, b)
#define vf_fnma(a, b, c) vfmsq_f32(c, a, b)
#define vf_abs vabsq_f32
#define vf_sum vaddvq_f32
#define vf_peak vmaxvq_f32
#define vf_round vrndnq_f32
#define vf_from_int vcvtq_f32_s32
#define vf_to_int vcvtnq_s32_f32
#define vi_zero() vdupq_n_s32(0)
#define vi_load(p) vld1q_s32((const int32_t *)(const void *)(p))
#define vi_set1 vdupq_n_s32
#define vi_add vaddq_s32
#define vi_sum vaddvq_s32
#define vi_byte(v, j) vshrq_n_s32(vshlq_n_s32(v, 24 - 8 * (j)), 24) /* byte j of each lane, signed */
#define vi_unsigned_byte(v, j) vandq_s32(vi_right(v, 8 * (j)), vi_set1(255))
#define vi_right(v, bits) vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(v), vi_set1(-(bits))))
#define vi_code(v, j) vandq_s32(vi_right(v, 8 * (j)), vi_set1(15)) /* low half of byte j of each lane */
#define vi_high_codes(v) vi_right(v, 4) /* to where vi_code finds them */
#define vf_load_half(p) vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)(const void *)(p))))

/* Numbers of bfloat16: the upper halves of floats. */
#define vf_load_upper(p) vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))

/* The second where one of them is no number, as on x86. */
INLINE VF vf_max(VF a, VF b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE VF vf_min(VF a, VF b) { return vbslq_f32(vcltq_f32(a, b), a, b); }

INLINE float float_of_half(uint16_t half) {
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(half))), 0);
}

INLINE uint16_t half_of_float(float x) {
    return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0);
}

/* v * 2^n for integral n held as floats, -126 <= n <= 127. */
INLINE VF vf_scale2(VF v, VF n) {
    return vf_mul(v, vreinterpretq_f32_s32(vshlq_n_s32(vi_add(vf_to_int(n), vi_set1(127)), 23)));
}

/* v * 2^n for the n that was rounded by adding 1.5 * 2^23: its last bits go to the exponent. */
INLINE VF vf_times_power(VF v, VF shifted) {
    return vreinterpretq_f32_s32(vi_add(vreinterpretq_s32_f32(v), vshlq_n_s32(vreinterpretq_s32_f32(shifted), 23)));
}

/* A bit for every lane in which they are equal. */
INLINE uint32_t vf_equal(VF a, VF b) {
    static const uint32_t bits[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vceqq_f32(a, b), vld1q_u32(bits)));
}

/* v, with zero in the lanes where x < limit. */
INLINE VF vf_zero_below(VF v, VF x, float limit) {
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), vcltq_f32(x, vf_set1(limit))));
}

/* v where the byte is non-zero, -inf elsewhere. */
INLINE VF vf_mask_bytes(VF v, const uint8_t *bytes) {
    const uint8x8_t four = vreinterpret_u8_s32(vdup_n_s32(load_int32(bytes)));
    const uint32x4_t wide = vmovl_u16(vget_low_u16(vmovl_u8(four)));
    return vbslq_f32(vceqq_u32(wide, vdupq_n_u32(0)), vf_set1(-INFINITY), v);
}

/* 4 small integers, one byte each. */
INLINE void store_bytes(int8_t *out, VI v) {
    const int16x4_t words = vqmovn_s32(v);
    const int32_t bytes = vget_lane_s32(vreinterpret_s32_s8(vqmovn_s16(vcombine_s16(words, words))), 0);
    memcpy(out, &bytes, sizeof bytes);
}

/* out[c * 4 + r] = rows[r][c] for c in 0..3. */
INLINE void transpose4(const float *const *rows, int64_t column, float *out) {
    const float32x4_t part0 = vf_load(rows[0] + column), part1 = vf_load(rows[1] + column);
    const float32x4_t part2 = vf_load(rows[2] + column), part3 = vf_load(rows[3] + column);
    const float32x4x4_t columns = {{part0, part1, part2, part3}};
    vst4q_f32(out, columns);
}

/* ---- sums of products of bytes: of 16 outputs, four in each of four vectors, over two steps of four inputs ---- */

#ifdef DOTPROD
#define vi_dot vdotq_s32
#else
/* sum += four products of signed bytes a lane; sums of two fit into 16 bits, as no byte is -128. */
INLINE VI vi_dot(VI sum, int8x16_t a, int8x16_t b) {
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vpadalq_s16(sum, vpaddq_s16(low, high));
}
#endif

/* Whether rows go in pairs: then the sums of two rows lie in tiles of 2 outputs x 2 rows. */
#ifdef I8MM
#define IN_PAIRS(rows) ((rows) > 1)
#else
#define IN_PAIRS(rows) 0
#endif

/* sums[row][part] += products of two steps of weights; the bytes of `rows` rows lie in x and, of the second step,
 * 4 * stride further. */
INLINE void dot_two_steps(const int rows, const int stride, int8x16_t w[2][4], const int8_t *x, VI (*sums)[4]) {
    if (!IN_PAIRS(rows)) {
        for (int m = 0; m < rows; m++)
            for (int step = 0; step < 2; step++) {
                const int8x16_t row = vreinterpretq_s8_s32(vi_set1(load_int32(x + 4 * (step * stride + m))));
                for (int part = 0; part < 4; part++) sums[m][part] = vi_dot(sums[m][part], w[step][part], row);
            }
        return;
    }
#ifdef I8MM
    for (int m = 0; m < rows; m += 2) {
        const int other = m + 1 < rows ? m + 1 : m; /* a row without a partner goes with itself */
        const int32_t bytes[4] = {load_int32(x + 4 * m), load_int32(x + 4 * (stride + m)), load_int32(x + 4 * other),
                                  load_int32(x + 4 * (stride + other))};
        const int8x16_t two_rows = vreinterpretq_s8_s32(vld1q_s32(bytes));
        for (int part = 0; part < 4; part++) {
            const VI first = vreinterpretq_s32_s8(w[0][part]), second = vreinterpretq_s32_s8(w[1][part]);
            const int8x16_t low = vreinterpretq_s8_s32(vzip1q_s32(first, second));
            const int8x16_t high = vreinterpretq_s8_s32(vzip2q_s32(first, second));
            sums[m][part] = vmmlaq_s32(sums[m][part], low, two_rows);
            sums[m + 1][part] = vmmlaq_s32(sums[m + 1][part], high, two_rows);
        }
    }
#endif
}

/* Where there are tiles: back to four outputs of a row in a vector. */
INLINE void take_rows_apart(const int rows, VI (*sums)[4]) {
    for (int m = 0; IN_PAIRS(rows) && m < rows; m += 2)
        for (int part = 0; part < 4; part++) {
            const VI low = sums[m][part], high = sums[m + 1][part];
            sums[m][part] = vuzp1q_s32(low, high), sums[m + 1][part] = vuzp2q_s32(low, high);
        }
}

/* Adds one group (64 inputs) of the int8 product to sums[block][row][16 outputs]; the layouts are in product.h. */
INLINE void dot_group(const int blocks, const int rows, const int stride, const int8_t *w, int64_t block_bytes,
                      const int8_t *x, const float *scales, const int32_t *totals, float *sums) {
    (void)totals;
    for (int b = 0; b < blocks; b++, w += block_bytes, sums += rows * 16) {
        VI dot[TILE][4];
        for (int m = 0; m < TILE; m++)
            for (int part = 0; part < 4; part++) dot[m][part] = vi_zero();
        for (int step = 0; step < 16; step += 2) {
            int8x16_t weights[2][4];
            for (int i = 0; i < 8; i++) weights[i / 4][i % 4] = vld1q_s8(w + 64 * step + 16 * i);
            for (int i = 0; i < 2; i++) prefetch_l2(w + 4 * block_bytes + 64 * (step + i));
            dot_two_steps(rows, stride, weights, x + 4 * step * stride, dot);
        }
        take_rows_apart(rows, dot);
        for (int m = 0; m < rows; m++)
            for (int part = 0; part < 4; part++) {
                float *sum = sums + m * 16 + 4 * part;
                vf_store(sum, vf_fma(vf_from_int(dot[m][part]), vf_set1(scales[m]), vf_load(sum)));
            }
    }
}

/* The whole product of 4-bit weights. */
INLINE void dot_groups4(const int blocks, const int rows, const int stride, const int8_t *w, int64_t block_bytes,
                        int64_t groups, const int8_t *x, const float *scales, const float *shares, float *sums) {
    for (int64_t g = 0; g < groups; g++, w += GROUP4_BYTES, x += GROUP * stride, scales += 2 * stride, shares += 2 * stride)
        for (int b = 0; b < blocks; b++)
            for (int half = 0; half < 2; half++) {
                const int8_t *group = w + b * block_bytes, *codes = group + 128 + 256 * half;
                VI dot[TILE][4];
                for (int m = 0; m < TILE; m++)
                    for (int part = 0; part < 4; part++) dot[m][part] = vi_zero();
                for (int step = 0; step < 4; step += 2) {
                    int8x16_t low[2][4], high[2][4];
                    for (int i = 0; i < 8; i++) {
                        const uint8x16_t bytes = vld1q_u8((const uint8_t *)codes + 64 * step + 16 * i);
                        low[i / 4][i % 4] = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
                        high[i / 4][i % 4] = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
                    }
                    for (int i = 0; i < 2; i++) prefetch_l2(codes + 4 * block_bytes + 64 * (step + i));
                    const int8_t *row = x + (32 * half + 4 * step) * stride;
                    dot_two_steps(rows, stride, low, row, dot);
                    dot_two_steps(rows, stride, high, row + 16 * stride, dot);
                }
                take_rows_apart(rows, dot);
                prefetch_l2(group + 4 * block_bytes + 64 * half);
                for (int m = 0; m < rows; m++)
                    for (int part = 0; part < 4; part++) {
                        const int8_t *numbers = group + 32 * half + 8 * part;
                        const VF scale = vf_load_half(numbers), offset = vf_load_half(numbers + 64);
                        float *sum = sums + (b * rows + m) * 16 + 4 * part;
                        const VF product = vf_mul(vf_from_int(dot[m][part]), scale);
                        const VF share = vf_fma(offset, vf_set1(shares[half * stride + m]), vf_load(sum));
                        vf_store(sum, vf_fma(product, vf_set1(scales[half * stride + m]), share));
                    }
            }
}

/* The whole product of weights in bytes; see dot_groups4. As signed bytes they need no other instructions than int8. */
INLINE void dot_bytes(const int bits, const int blocks, const int rows, const int stride, const int8_t *w,
                      int64_t block_bytes, int64_t groups, const int8_t *x, const float *scales, const float *shares,
                      const int32_t *quarters, float *sums) {
    const int parts = bits == BYTES5 ? 2 : 4, steps = 16 / parts;
    const int8x16_t flip = vdupq_n_s8(bits == BYTES8 ? -128 : 0); /* codes of 8 bits are weights + 128 */
    for (int i = 0; i < blocks * rows * 16; i++) sums[i] = 0;
    for (int64_t g = 0; g < groups; g++, w += GROUPED_BYTES, x += GROUP * stride) {
        for (int b = 0; b < blocks; b++)
            for (int part = 0; part < parts; part++) {
                const int8_t *group = w + b * block_bytes, *codes = group + 128 + 64 * steps * part;
                VI dot[TILE][4];
                for (int m = 0; m < TILE; m++)
                    for (int i = 0; i < 4; i++) dot[m][i] = vi_zero();
                for (int step = 0; step < steps; step += 2) {
                    int8x16_t weights[2][4];
                    for (int i = 0; i < 8; i++) weights[i / 4][i % 4] = veorq_s8(vld1q_s8(codes + 64 * step + 16 * i), flip);
                    for (int i = 0; i < 2; i++) prefetch_l2(codes + 4 * block_bytes + 64 * (step + i));
                    dot_two_steps(rows, stride, weights, x + 4 * (steps * part + step) * stride, dot);
                }
                take_rows_apart(rows, dot);
                for (int m = 0; m < rows; m++)
                    for (int i = 0; i < 4; i++) {
                        const int8_t *numbers = group + 32 * part + 8 * i;
                        float *sum = sums + (b * rows + m) * 16 + 4 * i;
                        VF so_far = vf_load(sum);
                        if (bits == BYTES6) dot[m][i] = vi_add(dot[m][i], vi_set1(32 * quarters[part * stride + m]));
                        if (bits == BYTES5)
                            so_far = vf_fma(vf_load_half(numbers + 64), vf_set1(shares[part * stride + m]), so_far);
                        const VF product = vf_mul(vf_from_int(dot[m][i]), vf_load_half(numbers));
                        vf_store(sum, vf_fma(product, vf_set1(scales[2 * part / parts * stride + m]), so_far));
                    }
            }
        scales += 2 * stride, shares += 2 * stride, quarters += 4 * stride;
    }
}
