/* Row-wise pieces of a decoder layer. Every function treats each row alone and in a fixed order, so a row's result
 * does not depend on how many rows go with it. */

/* e^x to about 2 ulp; exactly 0 below -87 (so that hidden keys and -inf get weight 0). */
INLINE VF vf_exp(VF x) {
    VF clipped = vf_min(vf_max(x, vf_set1(-87.0f)), vf_set1(88.0f));
    VF n = vf_round(vf_mul(clipped, vf_set1(1.44269504f)));
    VF r = vf_fnma(n, vf_set1(0.693145752f), clipped);
    r = vf_fnma(n, vf_set1(1.42860677e-6f), r);
    VF p = vf_set1(1.0f / 5040);
    p = vf_fma(p, r, vf_set1(1.0f / 720));
    p = vf_fma(p, r, vf_set1(1.0f / 120));
    p = vf_fma(p, r, vf_set1(1.0f / 24));
    p = vf_fma(p, r, vf_set1(1.0f / 6));
    p = vf_fma(p, r, vf_set1(0.5f));
    p = vf_fma(p, r, vf_set1(1.0f));
    p = vf_fma(p, r, vf_set1(1.0f));
    return vf_zero_below(vf_scale2(p, n), x, -87.0f);
}

/* gate <- gate * sigmoid(gate) * up, n floats (a multiple of VL). */
INLINE void silu_times(float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i += VL) {
        VF g = vf_load(gate + i);
        VF denominator = vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_zero(), g)));
        vf_store(gate + i, vf_mul(vf_div(g, denominator), vf_load(up + i)));
    }
}

/* out = x / rms(x) * weight; n is a multiple of VL; in place is allowed. */
INLINE void rms_norm(const float *x, const float *weight, float eps, int64_t n, float *out) {
    VF squares = vf_zero();
    for (int64_t i = 0; i < n; i += VL) squares = vf_fma(vf_load(x + i), vf_load(x + i), squares);
    VF factor = vf_set1(1.0f / sqrtf(vf_sum(squares) / (float)n + eps));
    for (int64_t i = 0; i < n; i += VL) vf_store(out + i, vf_mul(vf_load(weight + i), vf_mul(vf_load(x + i), factor)));
}

/* One head in the rotate-half convention: x <- x * cos + rotate_half(x) * sin; dim is a multiple of 2 * VL. */
INLINE void rotate(float *x, const float *cos, const float *sin, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i += VL) {
        VF a = vf_load(x + i), b = vf_load(x + half + i);
        vf_store(x + i, vf_fnma(b, vf_load(sin + i), vf_mul(a, vf_load(cos + i))));
        vf_store(x + half + i, vf_fma(a, vf_load(sin + half + i), vf_mul(b, vf_load(cos + half + i))));
    }
}

/* Symmetric quantisation of one row, 64 inputs at a time: x[64g + i] ~ scales[g] * q[64g + i], q in -127..127. Writes
 * the row's place in a tile of `rows` rows (see product.h), every four inputs `step` bytes after the last four of their
 * group; inputs from k up to `groups` * 64 are zero. */
INLINE void quantize_row(const float *x, int64_t k, int64_t groups, int rows, int step, int8_t *q, float *scales,
                         int32_t *totals) {
    for (int64_t g = 0; g < groups; g++) {
        float padded[GROUP];
        const float *part = x + g * GROUP;
        if (k - g * GROUP < GROUP) {
            memset(padded, 0, sizeof padded);
            part = memcpy(padded, part, (size_t)(k - g * GROUP) * sizeof(float));
        }
        VF peak = vf_zero();
        for (int i = 0; i < GROUP; i += VL) peak = vf_max(peak, vf_abs(vf_load(part + i)));
        const float largest = vf_peak(peak);
        const VF inverse = vf_set1(largest > 0 ? 127.0f / largest : 0.0f);
        VI total = vi_zero();
        int8_t bytes[GROUP];
        for (int i = 0; i < GROUP; i += VL) {
            VI v = vf_to_int(vf_mul(vf_load(part + i), inverse));
            total = vi_add(total, v);
            store_bytes(bytes + i, v);
        }
        for (int i = 0; i < GROUP / 4; i++) memcpy(q + g * GROUP * rows + i * step, bytes + 4 * i, 4);
        scales[g * rows] = largest / 127.0f;
        totals[g * rows] = vi_sum(total);
    }
}

/* One output's weights -> bytes in groups of four, 64 bytes apart; returns the scale. */
INLINE float pack_row(const float *w, int64_t k, int8_t *packed) {
    VF peak = vf_zero();
    float part[VL] = {0};
    const int64_t whole = k / VL * VL;
    memcpy(part, w + whole, (size_t)(k - whole) * sizeof(float));
    for (int64_t i = 0; i < k; i += VL) peak = vf_max(peak, vf_abs(vf_load(i < whole ? w + i : part)));
    const float largest = vf_peak(peak);
    const VF inverse = vf_set1(largest > 0 ? 127.0f / largest : 0.0f);
    for (int64_t i = 0; i < k; i += VL) {
        int8_t bytes[VL];
        store_bytes(bytes, vf_to_int(vf_mul(vf_load(i < whole ? w + i : part), inverse)));
        for (int g = 0; g < VL / 4; g++) memcpy(packed + (i / 4 + g) * 64, bytes + 4 * g, 4);
    }
    return largest / 127.0f;
}
