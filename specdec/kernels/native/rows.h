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

/* Symmetric quantisation of one row, 64 inputs at a time, or 32 where a group has two scales: x ~ scale * q, q in
 * -127..127. Writes the row's place in a tile of `rows` rows (see product.h), every four inputs `step` bytes after the
 * last four of their group; inputs from k up to `groups` * 64 are zero. */
INLINE void quantize_row(const float *x, int64_t k, int64_t groups, int64_t scales_per_group, int rows, int step,
                         int8_t *q, float *scales, int32_t *totals, float *shares, int32_t *quarters) {
    for (int64_t g = 0; g < groups; g++) {
        float padded[GROUP];
        const float *part = x + g * GROUP;
        if (k - g * GROUP < GROUP) {
            memset(padded, 0, sizeof padded);
            part = memcpy(padded, part, (size_t)(k - g * GROUP) * sizeof(float));
        }
        float largest[2];
        for (int half = 0; half < 2; half++) {
            VF peak = vf_zero();
            for (int i = 0; i < GROUP / 2; i += VL) peak = vf_max(peak, vf_abs(vf_load(part + GROUP / 2 * half + i)));
            largest[half] = vf_peak(peak);
        }
        if (scales_per_group == 1) largest[0] = largest[1] = largest[0] > largest[1] ? largest[0] : largest[1];
        int8_t bytes[GROUP];
        totals[g * rows] = 0;
        for (int half = 0; half < 2; half++) {
            const VF inverse = vf_set1(largest[half] > 0 ? 127.0f / largest[half] : 0.0f);
            const float scale = largest[half] / 127.0f;
            if (half < scales_per_group) scales[(scales_per_group * g + half) * rows] = scale;
            int32_t sum = 0;
            for (int quarter = 2 * half; quarter < 2 * half + 2; quarter++) {
                VI total = vi_zero();
                for (int i = quarter * GROUP / 4; i < (quarter + 1) * GROUP / 4; i += VL) {
                    VI v = vf_to_int(vf_mul(vf_load(part + i), inverse));
                    total = vi_add(total, v);
                    store_bytes(bytes + i, v);
                }
                const int32_t added = vi_sum(total);
                quarters[(4 * g + quarter) * rows] = -added;
                sum += added;
            }
            totals[g * rows] += sum;
            shares[(2 * g + half) * rows] = scale * (float)sum;
        }
        for (int i = 0; i < GROUP / 4; i++) memcpy(q + g * GROUP * rows + i * step, bytes + 4 * i, 4);
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

/* ---- 4-bit weights ---- */

/* 32 weights of an output: codes of 0..15 with w ~ code * scale + offset. */
typedef struct {
    float scale, offset;
    float codes[32];
    float error; /* the sum of squared differences */
} Group4;

INLINE float through_half(float x) {
    x = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
    return float_of_half(half_of_float(x));
}

/* The nearest codes for a scale and an offset, which become 16-bit floats first. */
INLINE void round_group(const float *w, float scale, float offset, Group4 *out) {
    out->scale = through_half(scale), out->offset = through_half(offset);
    const VF inverse = vf_set1(out->scale > 0 ? 1.0f / out->scale : 0.0f), s = vf_set1(out->scale), o = vf_set1(out->offset);
    VF error = vf_zero();
    for (int i = 0; i < 32; i += VL) {
        const VF x = vf_load(w + i), code = vf_round(vf_mul(vf_sub(x, o), inverse));
        const VF clipped = vf_min(vf_max(code, vf_zero()), vf_set1(15.0f));
        const VF difference = vf_sub(vf_fma(clipped, s, o), x);
        vf_store(out->codes + i, clipped);
        error = vf_fma(difference, difference, error);
    }
    out->error = vf_sum(error);
}

/* Least squares: the scale and offset that are best for a group's codes, then the codes that are nearest for them. */
INLINE void refit_group(const float *w, float lowest, Group4 *group) {
    VF codes = vf_zero(), squares = vf_zero(), heights = vf_zero(), products = vf_zero();
    for (int i = 0; i < 32; i += VL) {
        const VF code = vf_load(group->codes + i), height = vf_sub(vf_load(w + i), vf_set1(lowest));
        codes = vf_add(codes, code), squares = vf_fma(code, code, squares);
        heights = vf_add(heights, height), products = vf_fma(code, height, products);
    }
    const float code = vf_sum(codes) / 32, height = vf_sum(heights) / 32;
    const float variance = vf_sum(squares) / 32 - code * code, covariance = vf_sum(products) / 32 - code * height;
    if (!(variance > 0)) return;
    const float scale = covariance / variance;
    round_group(w, scale, lowest + height - scale * code, group);
}

/* The best of a few searches; each begins with a part of the range of weights, and fits twice. */
INLINE Group4 quantize_group(const float *w) {
    static const float parts[][2] = {{1, 1}, {0.9f, 1}, {1, 0.9f}, {0.87f, 0.87f}}; /* of the lowest, of the highest */
    VF peak = vf_load(w), depth = vf_sub(vf_zero(), peak);
    for (int i = VL; i < 32; i += VL) {
        peak = vf_max(peak, vf_load(w + i));
        depth = vf_max(depth, vf_sub(vf_zero(), vf_load(w + i)));
    }
    const float lowest = -vf_peak(depth), highest = vf_peak(peak);
    Group4 best, found;
    for (int i = 0; i < 4; i++) {
        const float low = lowest * parts[i][0], high = highest * parts[i][1];
        round_group(w, (high - low) / 15, low, &found);
        for (int fits = 0; fits <= 2; fits++) {
            if (fits) refit_group(w, lowest, &found);
            if (!(i + fits) || found.error < best.error) best = found;
        }
    }
    return best;
}

/* One output's weights -> its scales, offsets and codes in a block of outputs, see product.h. What stands for inputs from
 * k on repeats the last weight: nothing is multiplied by it. */
INLINE void pack_row4(const float *w, int64_t k, int8_t *block, int output) {
    for (int64_t at = 0; at < k; at += 32) {
        float part[32];
        for (int i = 0; i < 32; i++) part[i] = w[at + i < k ? at + i : k - 1];
        const Group4 found = quantize_group(part);
        int8_t *group = block + at / GROUP * GROUP4_BYTES;
        const int half = at % GROUP / 32;
        const uint16_t scale = half_of_float(found.scale), offset = half_of_float(found.offset);
        memcpy(group + 32 * half + 2 * output, &scale, 2);
        memcpy(group + 64 + 32 * half + 2 * output, &offset, 2);
        for (int i = 0; i < 16; i++)
            group[128 + 256 * half + i / 4 * 64 + 4 * output + i % 4] =
                (int8_t)((int)found.codes[i] | (int)found.codes[i + 16] << 4);
    }
}
