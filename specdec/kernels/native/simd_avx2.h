/* The vector vocabulary of the kernels, 8 floats wide (AVX2, FMA, F16C). Same names as simd_avx512.h. With AVX_VNNI
 * products take one instruction where they take three without. */
#ifndef ALSO /* what the processor has besides */
#define ALSO
#endif
#define TARGET __attribute__((target("avx2,fma,f16c" ALSO)))
#define INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c" ALSO)))
#define VL 8
#define REGISTERS 16
#define INT8_ACC 4 /* accumulators that stay in registers beside the operands */
#define INT4_ACC 4 /* the same, of 16 bits */
#ifdef AVX_VNNI
#define BYTES_ROWS 8 /* that pass over weights in bytes together */
#else
#define BYTES_ROWS 4 /* the same: each has a second accumulator */
#endif
#define WEIGHT_ONLY_BLOCKS(rows) ((rows) <= 2 ? 2 : 1) /* blocks of 16 outputs whose sums do */

#define VF __m256
#define VI __m256i
#define vf_zero _mm256_setzero_ps
#define vf_set1 _mm256_set1_ps
#define vf_load _mm256_loadu_ps
#define vf_store _mm256_storeu_ps
#define vf_add _mm256_add_ps
#define vf_sub _mm256_sub_ps
#define vf_mul _mm256_mul_ps
#define vf_div _mm256_div_ps
#define vf_fma _mm256_fmadd_ps
#define vf_fnma _mm256_fnmadd_ps
#define vf_max _mm256_max_ps
#define vf_min _mm256_min_ps
#define vf_abs(v) _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v)
#define vf_round(v) _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define vf_from_int _mm256_cvtepi32_ps
#define vf_to_int _mm256_cvtps_epi32
#define vi_zero _mm256_setzero_si256
#define vi_load(p) _mm256_loadu_si256((const __m256i *)(p))
#define vi_set1 _mm256_set1_epi32
#define vi_add _mm256_add_epi32
#define vi_byte(v, j) _mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * (j)), 24) /* byte j of each lane, signed */
#define vi_unsigned_byte(v, j) _mm256_and_si256(_mm256_srli_epi32(v, 8 * (j)), vi_set1(255))
#define vi_code(v, j) _mm256_and_si256(_mm256_srli_epi32(v, 8 * (j)), vi_set1(15)) /* low half of byte j of each lane */
#define vi_high_codes(v) _mm256_srli_epi32(v, 4) /* to where vi_code finds them */
#define vf_load_half(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))

/* sum += v in a loop: for the intrinsic, gcc 12 copies every accumulator, every step. */
#define vi_add_to(sum, v) __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(v))

/* sum += products of codes, 0..15, and signed bytes, four to a lane or twice two; what 32 inputs add up to fits into 16
 * bits, as two sums of 16 products of at most 15 * 127. */
#ifdef AVX_VNNI
#define vi_dot_to(sum, codes, bytes) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(bytes))
#define vi_dot(sum, codes, bytes) do { (sum) = vi_zero(); vi_dot_to(sum, codes, bytes); } while (0)
#define vi_lanes(sum) (sum)
#else
#define vi_dot(sum, codes, bytes) ((sum) = _mm256_maddubs_epi16(codes, bytes))
#define vi_dot_to(sum, codes, bytes) __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(_mm256_maddubs_epi16(codes, bytes)))
#define vi_lanes(sum) _mm256_madd_epi16(sum, _mm256_set1_epi16(1))
#endif

/* Numbers of bfloat16: the upper halves of floats. */
#define vf_load_upper(p) \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))

INLINE float float_of_half(uint16_t half) { return _cvtsh_ss(half); }
INLINE uint16_t half_of_float(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

INLINE float vf_sum(VF v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

INLINE float vf_peak(VF v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

INLINE int32_t vi_sum(VI v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
}

/* v * 2^n for integral n held as floats, -126 <= n <= 127. */
INLINE VF vf_scale2(VF v, VF n) {
    VI power = _mm256_slli_epi32(_mm256_add_epi32(vf_to_int(n), vi_set1(127)), 23);
    return vf_mul(v, _mm256_castsi256_ps(power));
}

/* v * 2^n for the n that was rounded by adding 1.5 * 2^23: its last bits go to the exponent. */
INLINE VF vf_times_power(VF v, VF shifted) {
    return _mm256_castsi256_ps(vi_add(_mm256_castps_si256(v), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
}

/* A bit for every lane in which they are equal. */
INLINE uint32_t vf_equal(VF a, VF b) { return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }

/* v, with zero in the lanes where x < limit. */
INLINE VF vf_zero_below(VF v, VF x, float limit) {
    return _mm256_and_ps(_mm256_cmp_ps(x, vf_set1(limit), _CMP_NLT_UQ), v);
}

/* v where the byte is non-zero, -inf elsewhere. */
INLINE VF vf_mask_bytes(VF v, const uint8_t *bytes) {
    VI wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes));
    VI hidden = _mm256_cmpeq_epi32(wide, vi_zero());
    return _mm256_blendv_ps(v, vf_set1(-INFINITY), _mm256_castsi256_ps(hidden));
}

/* 8 small integers, one byte each. */
INLINE void store_bytes(int8_t *out, VI v) {
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64((__m128i *)out, _mm_packs_epi16(words, words));
}

/* out[c * 8 + r] = rows[r][c] for c in 0..3: each load takes the same 128-bit column of every fourth row. */
INLINE void transpose4(const float *const *rows, int64_t column, float *out) {
    __m256 part[4];
    for (int r = 0; r < 4; r++)
        part[r] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[r] + column)),
                                       _mm_loadu_ps(rows[r + 4] + column), 1);
    __m256 a = _mm256_unpacklo_ps(part[0], part[1]), b = _mm256_unpacklo_ps(part[2], part[3]);
    __m256 c = _mm256_unpackhi_ps(part[0], part[1]), d = _mm256_unpackhi_ps(part[2], part[3]);
    vf_store(out, _mm256_shuffle_ps(a, b, 0x44));
    vf_store(out + VL, _mm256_shuffle_ps(a, b, 0xEE));
    vf_store(out + 2 * VL, _mm256_shuffle_ps(c, d, 0x44));
    vf_store(out + 3 * VL, _mm256_shuffle_ps(c, d, 0xEE));
}

#ifdef AVX_VNNI
/* See below. The unsigned side are the weights, which get +128, and the accumulators start at -128 * sum(x). */
INLINE void dot_group(const int blocks, const int rows, const int stride, const int8_t *w, int64_t block_bytes,
                      const int8_t *x, const float *scales, const int32_t *totals, float *sums) {
    const VI flip = _mm256_set1_epi8((char)0x80);
    VI acc[4][TILE][2];
    for (int b = 0; b < blocks; b++)
        for (int m = 0; m < rows; m++) acc[b][m][0] = acc[b][m][1] = vi_set1(-128 * totals[m]);
#pragma GCC unroll 2
    for (int step = 0; step < 16; step++)
        for (int b = 0; b < blocks; b++) {
            const int8_t *weights = w + b * block_bytes + 64 * step;
            const VI low = _mm256_xor_si256(vi_load(weights), flip), high = _mm256_xor_si256(vi_load(weights + 32), flip);
            prefetch_l2(weights + 4 * block_bytes);
            for (int m = 0; m < rows; m++) {
                const VI row = vi_set1(load_int32(x + 4 * (step * stride + m)));
                vi_dot_to(acc[b][m][0], low, row);
                vi_dot_to(acc[b][m][1], high, row);
            }
        }
    for (int b = 0; b < blocks; b++)
        for (int m = 0; m < rows; m++)
            for (int half = 0; half < 2; half++) {
                float *sum = sums + (b * rows + m) * 16 + half * 8;
                vf_store(sum, vf_fma(vf_from_int(acc[b][m][half]), vf_set1(scales[m]), vf_load(sum)));
            }
}
#else
/* Adds one group (64 inputs) of the int8 product to sums[block][row][16 outputs]; the layouts are in product.h. |x| is
 * the unsigned side and x's sign moves to the weights; both lie in -127..127, so 16-bit pair sums cannot saturate. */
INLINE void dot_group(const int blocks, const int rows, const int stride, const int8_t *w, int64_t block_bytes,
                      const int8_t *x, const float *scales, const int32_t *totals, float *sums) {
    const VI ones = _mm256_set1_epi16(1);
    VI acc[4][TILE][2];
    (void)totals;
    for (int b = 0; b < blocks; b++)
        for (int m = 0; m < rows; m++) acc[b][m][0] = acc[b][m][1] = vi_zero();
#pragma GCC unroll 2
    for (int step = 0; step < 16; step++)
        for (int b = 0; b < blocks; b++) {
            const int8_t *weights = w + b * block_bytes + 64 * step;
            VI low = vi_load(weights), high = vi_load(weights + 32);
            prefetch_l2(weights + 4 * block_bytes);
            for (int m = 0; m < rows; m++) {
                VI row = vi_set1(load_int32(x + 4 * (step * stride + m))), size = _mm256_abs_epi8(row);
                VI pairs0 = _mm256_maddubs_epi16(size, _mm256_sign_epi8(low, row));
                VI pairs1 = _mm256_maddubs_epi16(size, _mm256_sign_epi8(high, row));
                vi_add_to(acc[b][m][0], _mm256_madd_epi16(pairs0, ones));
                vi_add_to(acc[b][m][1], _mm256_madd_epi16(pairs1, ones));
            }
        }
    for (int b = 0; b < blocks; b++)
        for (int m = 0; m < rows; m++)
            for (int half = 0; half < 2; half++) {
                float *sum = sums + (b * rows + m) * 16 + half * 8;
                vf_store(sum, vf_fma(vf_from_int(acc[b][m][half]), vf_set1(scales[m]), vf_load(sum)));
            }
}

#endif

/* Adds `count` steps of four inputs, of half a block of weights in bytes, to 32-bit sums. */
#ifdef AVX_VNNI
#define ROWS_TAKE_SIGNS 0
INLINE void add_bytes(const int bits, const int count, const int rows, const int stride, const int8_t *codes,
                      const int8_t *x, VI *dot) {
    (void)bits;
    for (int step = 0; step < count; step++) {
        const VI bytes = vi_load(codes + 64 * step);
        for (int m = 0; m < rows; m++) vi_dot_to(dot[m], bytes, vi_set1(load_int32(x + 4 * (step * stride + m))));
    }
}
#else
#define ROWS_TAKE_SIGNS 1
INLINE void add_bytes(const int bits, const int count, const int rows, const int stride, const int8_t *codes,
                      const int8_t *x, VI *dot) {
    VI bytes[4], sizes[4];
    for (int step = 0; step < count; step++) {
        bytes[step] = vi_load(codes + 64 * step);
        if (bits == BYTES8) bytes[step] = _mm256_xor_si256(bytes[step], _mm256_set1_epi8((char)0x80));
        sizes[step] = bits == BYTES8 ? _mm256_abs_epi8(bytes[step]) : bytes[step];
    }
    for (int m = 0; m < rows; m++) {
        VI pairs = vi_zero();
        for (int step = 0; step < count; step++) {
            VI row = vi_set1(load_int32(x + 4 * (step * stride + m)));
            if (bits == BYTES8) row = _mm256_sign_epi8(row, bytes[step]);
            const VI product = _mm256_maddubs_epi16(sizes[step], row);
            pairs = step ? _mm256_add_epi16(pairs, product) : product;
        }
        vi_add_to(dot[m], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
}
#endif

/* The products of 4 of the 32 inputs whose codes' low or high halves are taken: begins sums, or adds to them. A row's
 * bytes are read once for the two halves of all blocks: instructions, not the multipliers, are what is short. */
INLINE void add_codes4(const int begins, const int high, const int blocks, const int rows, const int8_t *codes,
                       int64_t block_bytes, const int8_t *row, VI dot[4][4][2]) {
    const VI low_bits = _mm256_set1_epi8(15);
    for (int b = 0; b < blocks; b++, codes += block_bytes) {
        VI code[2];
        for (int side = 0; side < 2; side++) {
            const VI bytes = vi_load(codes + 32 * side);
            code[side] = _mm256_and_si256(high ? vi_high_codes(bytes) : bytes, low_bits);
        }
        if (!high) prefetch_l2(codes + 4 * block_bytes);
        for (int m = 0; m < rows; m++) {
            const VI x = vi_set1(load_int32(row + 4 * m));
            for (int side = 0; side < 2; side++)
                if (begins)
                    vi_dot(dot[b][m][side], code[side], x);
                else
                    vi_dot_to(dot[b][m][side], code[side], x);
        }
    }
}

/* The whole product of 4-bit weights, whose codes are the unsigned side: the sums of half a group stay in registers. */
INLINE void dot_groups4(const int blocks, const int rows, const int stride, const int8_t *w, int64_t block_bytes,
                        int64_t groups, const int8_t *x, const float *scales, const float *shares, float *sums) {
    for (int i = 0; i < blocks * rows * 16; i++) sums[i] = 0;
    for (int64_t halves = 2 * groups; halves; halves--) {
        const int half = halves % 2; /* the first is 0 */
        const int8_t *codes = w + 128 + 256 * half;
        VI dot[4][4][2];
        add_codes4(1, 0, blocks, rows, codes, block_bytes, x, dot);
        add_codes4(0, 1, blocks, rows, codes, block_bytes, x + 16 * stride, dot);
        for (int step = 1; step < 4; step++) {
            add_codes4(0, 0, blocks, rows, codes + 64 * step, block_bytes, x + 4 * step * stride, dot);
            add_codes4(0, 1, blocks, rows, codes + 64 * step, block_bytes, x + (16 + 4 * step) * stride, dot);
        }
        for (int b = 0; b < blocks; b++)
            for (int side = 0; side < 2; side++) {
                const int8_t *numbers = w + b * block_bytes + 32 * half + 16 * side;
                const VF scale = vf_load_half(numbers), offset = vf_load_half(numbers + 64);
                if (!side) prefetch_l2(numbers + 4 * block_bytes + 32 * half);
                for (int m = 0; m < rows; m++) {
                    float *sum = sums + (b * rows + m) * 16 + 8 * side;
                    const VF product = vf_mul(vf_from_int(vi_lanes(dot[b][m][side])), scale);
                    const VF share = vf_fma(offset, vf_set1(shares[m]), vf_load(sum));
                    vf_store(sum, vf_fma(product, vf_set1(scales[m]), share));
                }
            }
        x += GROUP / 2 * stride, scales += stride, shares += stride;
        if (half) w += GROUP4_BYTES;
    }
}

/* The whole product of weights in bytes, half a block of outputs at a time; see dot_groups4. 16-bit sums hold four
 * products of two codes below 32, or two of codes below 64; with codes up to 255 the weights' signs go to the rows. */
INLINE void dot_bytes(const int bits, const int blocks, const int rows, const int stride, const int8_t *w,
                      int64_t block_bytes, int64_t groups, const int8_t *x, const float *scales, const float *shares,
                      const int32_t *quarters, float *sums) {
    const int parts = bits == BYTES5 ? 2 : 4, steps = 16 / parts;
    for (int i = 0; i < blocks * rows * 16; i++) sums[i] = 0;
    for (int64_t g = 0; g < groups; g++, w += GROUPED_BYTES, x += GROUP * stride) {
        for (int part = 0; part < parts; part++)
            for (int side = 0; side < 2; side++) {
                const int8_t *codes = w + 128 + 64 * steps * part + 32 * side, *row = x + 4 * steps * stride * part;
                const int8_t *next = codes + 4 * block_bytes;
                on_its_own(codes);
                on_its_own(next);
                VI dot[4][TILE];
                for (int b = 0; b < blocks; b++)
                    for (int m = 0; m < rows; m++)
                        dot[b][m] = bits == BYTES5 || (bits == BYTES8 && ROWS_TAKE_SIGNS)
                                        ? vi_zero()
                                        : _mm256_slli_epi32(vi_set1(quarters[part * stride + m]), bits == BYTES6 ? 5 : 7);
                const int together = bits == BYTES5 ? 4 : bits == BYTES6 ? 2 : 1;
#pragma GCC unroll 2
                for (int step = 0; step < steps; step += together, row += 4 * together * stride) {
                    on_its_own(row);
                    for (int b = 0; b < blocks; b++) {
                        add_bytes(bits, together, rows, stride, codes + b * block_bytes + 64 * step, row, dot[b]);
                        for (int i = 0; !side && i < together; i++) prefetch_l2(next + b * block_bytes + 64 * (step + i));
                    }
                }
                for (int b = 0; b < blocks; b++) {
                    const int8_t *numbers = w + b * block_bytes + 32 * part + 16 * side;
                    const VF scale = vf_load_half(numbers), offset = bits == BYTES5 ? vf_load_half(numbers + 64) : vf_zero();
                    if (!side) prefetch_l2(numbers + 4 * block_bytes);
                    for (int m = 0; m < rows; m++) {
                        float *sum = sums + (b * rows + m) * 16 + 8 * side;
                        VF so_far = vf_load(sum);
                        if (bits == BYTES5) so_far = vf_fma(offset, vf_set1(shares[part * stride + m]), so_far);
                        const VF row_scale = vf_set1(scales[2 * part / parts * stride + m]);
                        vf_store(sum, vf_fma(vf_mul(vf_from_int(dot[b][m]), scale), row_scale, so_far));
                    }
                }
            }
        scales += 2 * stride, shares += 2 * stride, quarters += 4 * stride;
    }
}

#ifndef AVX_VNNI
/* ---- many rows: two products of 16 bits and their sum in one instruction, without signs to move ---- */

#define FEWEST_PAIRED_ROWS 16 /* enough of them to widen weights and rows for */

/* `count` bytes -> as many 16-bit integers; of each four bytes the first goes beside the third in one vector, the second
 * beside the fourth in the next. */
INLINE void widen(const int8_t *bytes, int64_t count, int16_t *pairs) {
    for (int64_t i = 0; i < count; i += 32) {
        VI v = vi_load(bytes + i);
        _mm256_storeu_si256((VI *)(pairs + i), _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8));
        _mm256_storeu_si256((VI *)(pairs + i + 16), _mm256_srai_epi16(v, 8));
    }
}

/* As dot_group, for a block of 16 outputs and `rows` rows from a tile of TILE, both widened. */
INLINE void dot_pairs(const int rows, const int16_t *w, const int16_t *x, const float *scales, float *sums) {
    VI acc[4][2];
    for (int m = 0; m < rows; m++) acc[m][0] = acc[m][1] = vi_zero();
    for (int step = 0; step < 16; step++, w += 64, x += 4 * TILE)
        for (int odd = 0; odd < 2; odd++) {
            VI low = vi_load(w + 16 * odd), high = vi_load(w + 32 + 16 * odd);
            for (int m = 0; m < rows; m++) {
                VI row = vi_set1(load_int32(x + 2 * (odd * TILE + m)));
                vi_add_to(acc[m][0], _mm256_madd_epi16(low, row));
                vi_add_to(acc[m][1], _mm256_madd_epi16(high, row));
            }
        }
    for (int m = 0; m < rows; m++)
        for (int half = 0; half < 2; half++) {
            float *sum = sums + m * STRIP + half * 8;
            vf_store(sum, vf_fma(vf_from_int(acc[m][half]), vf_set1(scales[m]), vf_load(sum)));
        }
}
#endif
