/* The vector vocabulary of the kernels, 16 floats wide (AVX-512 F/BW/VL + VNNI). Same names as simd_avx2.h. */
#ifndef ALSO /* what the processor has besides */
#define ALSO
#endif
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni" ALSO)))
#define INLINE static inline __attribute__((always_inline, target("avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni" ALSO)))
#define VL 16
#define INT8_ACC 16 /* accumulators that stay in registers beside the operands */
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
#define vi_sum _mm512_reduce_add_epi32

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
