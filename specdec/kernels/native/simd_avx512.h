/* The vector vocabulary of the kernels, 16 floats wide (AVX-512 F/BW/VL + VNNI). Same names as simd_avx2.h. */
#ifndef ALSO /* what the processor has besides */
#define ALSO
#endif
#define TARGET __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni" ALSO)))
#define INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni" ALSO)))
#define VL 16
#define REGISTERS 32
#define INT8_ACC 16 /* accumulators that stay in registers beside the operands */
#define INT4_ACC 8 /* sums, of which each has two accumulators */
#define BYTES_ROWS 8 /* that pass over weights in bytes together */
#define WEIGHT_ONLY_BLOCKS(rows) 4 /* blocks of 16 outputs whose sums do */

#define VF __m512
#define VI __m512i
#define vf_zero _mm512_setzero_ps
#define vf_set1 _mm512_set1_ps
#define vf_load _mm512_loadu_ps
#define vf_store _mm512_storeu_ps
#define vf_add _mm512_add_ps
#define vf_sub _mm512_sub_ps
#define vf_mul _mm512_mul_ps
#define vf_div _mm512_div_ps
#define vf_fma _mm512_fmadd_ps
#define vf_fnma _mm512_fnmadd_ps
#define vf_max _mm512_max_ps
#define vf_min _mm512_min_ps
#define vf_abs _mm512_abs_ps
#define vf_sum _mm512_reduce_add_ps
#define vf_peak _mm512_reduce_max_ps
#define vf_round(v) _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define vf_from_int _mm512_cvtepi32_ps
#define vf_to_int _mm512_cvtps_epi32
#define vi_zero _mm512_setzero_si512
#define vi_load(p) _mm512_loadu_si512((const void *)(p))
#define vi_set1 _mm512_set1_epi32
#define vi_add _mm512_add_epi32
#define vi_byte(v, j) _mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * (j)), 24) /* byte j of each lane, signed */
#define vi_unsigned_byte(v, j) _mm512_and_si512(_mm512_srli_epi32(v, 8 * (j)), vi_set1(255))
#define vi_code(v, j) _mm512_and_si512(_mm512_srli_epi32(v, 8 * (j)), vi_set1(15)) /* low half of byte j of each lane */
#define vi_high_codes(v) _mm512_srli_epi32(v, 4) /* to where vi_code finds them */
#define vi_sum _mm512_reduce_add_epi32
#define vf_load_half(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))

/* Numbers of bfloat16: the upper halves of floats. */
#define vf_load_upper(p) \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))

INLINE float float_of_half(uint16_t half) { return _cvtsh_ss(half); }
INLINE uint16_t half_of_float(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

/* v * 2^n for integral n held as floats. */
INLINE VF vf_scale2(VF v, VF n) { return _mm512_scalef_ps(v, n); }

/* v * 2^n for the n that was rounded by adding 1.5 * 2^23: its last bits go to the exponent. */
INLINE VF vf_times_power(VF v, VF shifted) {
    return _mm512_castsi512_ps(vi_add(_mm512_castps_si512(v), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
}

/* A bit for every lane in which they are equal. */
INLINE uint32_t vf_equal(VF a, VF b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }

/* v, with zero in the lanes where x < limit. */
INLINE VF vf_zero_below(VF v, VF x, float limit) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, vf_set1(limit), _CMP_NLT_UQ), v);
}

/* v where the byte is non-zero, -inf elsewhere. */
INLINE VF vf_mask_bytes(VF v, const uint8_t *bytes) {
    __m128i b = _mm_loadu_si128((const __m128i *)bytes);
    return _mm512_mask_mov_ps(vf_set1(-INFINITY), _mm_test_epi8_mask(b, b), v);
}

/* 16 small integers, one byte each. */
INLINE void store_bytes(int8_t *out, VI v) { _mm_storeu_si128((__m128i *)out, _mm512_cvtepi32_epi8(v)); }

/* out[c * 16 + r] = rows[r][c] for c in 0..3: each load takes the same 128-bit column of every fourth row. */
INLINE void transpose4(const float *const *rows, int64_t column, float *out) {
    __m512 part[4];
    for (int r = 0; r < 4; r++) {
        __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(rows[r] + column));
        v = _mm512_insertf32x4(v, _mm_loadu_ps(rows[r + 4] + column), 1);
        v = _mm512_insertf32x4(v, _mm_loadu_ps(rows[r + 8] + column), 2);
        part[r] = _mm512_insertf32x4(v, _mm_loadu_ps(rows[r + 12] + column), 3);
    }
    __m512 a = _mm512_unpacklo_ps(part[0], part[1]), b = _mm512_unpacklo_ps(part[2], part[3]);
    __m512 c = _mm512_unpackhi_ps(part[0], part[1]), d = _mm512_unpackhi_ps(part[2], part[3]);
    vf_store(out, _mm512_shuffle_ps(a, b, 0x44));
    vf_store(out + VL, _mm512_shuffle_ps(a, b, 0xEE));
    vf_store(out + 2 * VL, _mm512_shuffle_ps(c, d, 0x44));
    vf_store(out + 3 * VL, _mm512_shuffle_ps(c, d, 0xEE));
}

/* Adds one group (64 inputs) of the int8 product to sums[block][row][16 outputs]; the layouts are in product.h. The
 * product instruction wants one unsigned side: weights get +128, and the accumulators start at -128 * sum(x). */
INLINE void dot_group(const int blocks, const int rows, const int stride, const int8_t *w, int64_t block_bytes,
                      const int8_t *x, const float *scales, const int32_t *totals, float *sums) {
    const VI flip = _mm512_set1_epi8((char)0x80);
    VI acc[4][TILE];
    for (int b = 0; b < blocks; b++)
        for (int m = 0; m < rows; m++) acc[b][m] = vi_set1(-128 * totals[m]);
#pragma GCC unroll 2
    for (int step = 0; step < 16; step++) {
        VI row[TILE];
        for (int m = 0; m < rows; m++) row[m] = vi_set1(load_int32(x + 4 * (step * stride + m)));
        for (int b = 0; b < blocks; b++) {
            VI weight = _mm512_xor_si512(vi_load(w + b * block_bytes + 64 * step), flip);
            prefetch_l2(w + (b + 4) * block_bytes + 64 * step);
            for (int m = 0; m < rows; m++) /* not the intrinsic: for that gcc 12 copies every accumulator, every step */
                __asm__("vpdpbusd %2, %1, %0" : "+v"(acc[b][m]) : "v"(weight), "v"(row[m]));
        }
    }
    for (int b = 0; b < blocks; b++)
        for (int m = 0; m < rows; m++) {
            float *sum = sums + (b * rows + m) * 16;
            vf_store(sum, vf_fma(vf_from_int(acc[b][m]), vf_set1(scales[m]), vf_load(sum)));
        }
}

/* The whole product of 4-bit weights, which are unsigned as they are; see dot_group. Sums stay in registers. */
INLINE void dot_groups4(const int blocks, const int rows, const int stride, const int8_t *w, int64_t block_bytes,
                        int64_t groups, const int8_t *x, const float *scales, const float *shares, float *sums) {
    const VI low_bits = _mm512_set1_epi8(15);
    VF sum[4][TILE];
    for (int b = 0; b < blocks; b++)
        for (int m = 0; m < rows; m++) sum[b][m] = vf_zero();
    for (int64_t g = 0; g < groups; g++, w += GROUP4_BYTES, x += GROUP * stride, scales += 2 * stride, shares += 2 * stride)
        for (int b = 0; b < blocks; b++) {
            const int8_t *group = w + b * block_bytes;
            VI dot[2][TILE];
            for (int m = 0; m < rows; m++) dot[0][m] = dot[1][m] = vi_zero();
#pragma GCC unroll 8
            for (int step = 0; step < 8; step++) {
                const VI bytes = vi_load(group + 128 + 64 * step);
                const VI low = _mm512_and_si512(bytes, low_bits), high = _mm512_and_si512(vi_high_codes(bytes), low_bits);
                const int8_t *row = x + (32 * (step / 4) + 4 * (step % 4)) * stride;
                prefetch_l2(group + 4 * block_bytes + 64 * step);
                for (int m = 0; m < rows; m++, row += 4) {
                    __asm__("vpdpbusd %2, %1, %0" : "+v"(dot[step / 4][m]) : "v"(low), "v"(vi_set1(load_int32(row))));
                    __asm__("vpdpbusd %2, %1, %0"
                            : "+v"(dot[step / 4][m])
                            : "v"(high), "v"(vi_set1(load_int32(row + 16 * stride))));
                }
            }
            prefetch_l2(group + 4 * block_bytes + 512);
            prefetch_l2(group + 4 * block_bytes + 576);
            for (int half = 0; half < 2; half++) {
                const VF scale = vf_load_half(group + 32 * half), offset = vf_load_half(group + 64 + 32 * half);
                for (int m = 0; m < rows; m++) {
                    const VF product = vf_mul(vf_from_int(dot[half][m]), scale);
                    const VF share = vf_fma(offset, vf_set1(shares[half * stride + m]), sum[b][m]);
                    sum[b][m] = vf_fma(product, vf_set1(scales[half * stride + m]), share);
                }
            }
        }
    for (int b = 0; b < blocks; b++)
        for (int m = 0; m < rows; m++) vf_store(sums + (b * rows + m) * 16, sum[b][m]);
}

/* The whole product of weights in bytes, codes of which are unsigned; see dot_groups4. */
INLINE void dot_bytes(const int bits, const int blocks, const int rows, const int stride, const int8_t *w,
                      int64_t block_bytes, int64_t groups, const int8_t *x, const float *scales, const float *shares,
                      const int32_t *quarters, float *sums) {
    const int parts = bits == BYTES5 ? 2 : 4, steps = 16 / parts;
    VF sum[4][TILE];
    for (int b = 0; b < blocks; b++)
        for (int m = 0; m < rows; m++) sum[b][m] = vf_zero();
    for (int64_t g = 0; g < groups; g++, w += GROUPED_BYTES, x += GROUP * stride) {
        for (int b = 0; b < blocks; b++) {
            const int8_t *group = w + b * block_bytes, *row = x, *next = group + 4 * block_bytes;
            on_its_own(next);
            prefetch_l2(next);
            prefetch_l2(next + 64);
#pragma GCC unroll 4
            for (int part = 0; part < parts; part++) {
                VI dot[TILE];
                for (int m = 0; m < rows; m++)
                    dot[m] = bits == BYTES5 ? vi_zero()
                                            : _mm512_slli_epi32(vi_set1(quarters[part * stride + m]), bits == BYTES6 ? 5 : 7);
#pragma GCC unroll 8
                for (int step = part * steps; step < (part + 1) * steps; step++, row += 4 * stride) {
                    const VI codes = vi_load(group + 128 + 64 * step);
                    prefetch_l2(next + 128 + 64 * step);
                    on_its_own(row);
                    for (int m = 0; m < rows; m++)
                        __asm__("vpdpbusd %2, %1, %0"
                                : "+v"(dot[m])
                                : "v"(codes), "v"(vi_set1(load_int32(row + 4 * m))));
                }
                const VF scale = vf_load_half(group + 32 * part);
                for (int m = 0; m < rows; m++) {
                    if (bits == BYTES5)
                        sum[b][m] = vf_fma(vf_load_half(group + 64 + 32 * part), vf_set1(shares[part * stride + m]), sum[b][m]);
                    const VF row_scale = vf_set1(scales[2 * part / parts * stride + m]);
                    sum[b][m] = vf_fma(vf_mul(vf_from_int(dot[m]), scale), row_scale, sum[b][m]);
                }
            }
        }
        scales += 2 * stride, shares += 2 * stride, quarters += 4 * stride;
    }
    for (int b = 0; b < blocks; b++)
        for (int m = 0; m < rows; m++) vf_store(sums + (b * rows + m) * 16, sum[b][m]);
}
