/* Tokens drawn from distributions that are given by their scores, and the verification of the trees they make. One
 * thread, one pass over a row of scores for each question; what trees.token_source and specdec.acceptance do with torch. */

#define AHEAD 8 /* blocks fetched before they are read: the processor's own fetching stops at every page */

/* Copies a block of scores; -inf past the vocabulary and for the tokens that are out. */
INLINE void load_block(const float *x, int64_t vocab, int64_t block, const int64_t *out, int64_t num_out,
                       float *scores) {
    const int64_t first = block * BLOCK, count = vocab - first < BLOCK ? vocab - first : BLOCK;
    memcpy(scores, x + first, (size_t)count * sizeof(float));
    for (int64_t i = count; i < BLOCK; i++) scores[i] = -INFINITY;
    for (int64_t i = 0; i < num_out; i++)
        if (out[i] / BLOCK == block) scores[out[i] - first] = -INFINITY;
}

INLINE float block_peak(const float *x) {
    VF peak[4];
    for (int a = 0; a < 4; a++) peak[a] = vf_load(x + a * VL);
    for (int i = 4 * VL; i < BLOCK; i += 4 * VL)
        for (int a = 0; a < 4; a++) peak[a] = vf_max(peak[a], vf_load(x + i + a * VL));
    return vf_peak(vf_max(vf_max(peak[0], peak[1]), vf_max(peak[2], peak[3])));
}

/* e^x for x <= 0; wrong by 2e-7 of it near 0 and 3e-6 at -87, where it ends. In binary digits x is n + f, |f| <= 1/2, and
 * the polynomial is 2^f. */
INLINE VF exp_negative(VF x) {
    const VF magic = vf_set1(12582912.0f); /* 1.5 * 2^23: what is added to it is rounded to an integer */
    const VF digits = vf_set1(1.44269504f), clipped = vf_max(vf_set1(-87.0f), x); /* in this order NaN stays */
    const VF shifted = vf_fma(clipped, digits, magic);
    const VF f = vf_fma(clipped, digits, vf_sub(magic, shifted));
    VF p = vf_fma(vf_set1(0.00132647273f), f, vf_set1(0.00967151299f));
    p = vf_fma(p, f, vf_set1(0.0555073358f));
    p = vf_fma(p, f, vf_set1(0.240222424f));
    p = vf_fma(p, f, vf_set1(0.693147004f));
    p = vf_fma(p, f, vf_set1(1.0f));
    return vf_times_power(p, shifted);
}

/* The sum of e^(x - peak). */
INLINE float block_sum(const float *x, float peak) {
    if (peak == -INFINITY) return 0;
    VF sum[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()}, shift = vf_set1(peak);
    for (int i = 0; i < BLOCK; i += 4 * VL)
        for (int a = 0; a < 4; a++) sum[a] = vf_add(sum[a], exp_negative(vf_sub(vf_load(x + i + a * VL), shift)));
    return vf_sum(vf_add(vf_add(sum[0], sum[1]), vf_add(sum[2], sum[3])));
}

/* Peak and share of the probability of every block, both padded to whole vectors; returns the logarithm of the sum of
 * e^x over the row. */
static TARGET double scan_row(const float *x, int64_t vocab, float *peaks, float *shares) {
    const int64_t num_blocks = NUM_BLOCKS(vocab), padded = PADDED_BLOCKS(vocab);
    float last[BLOCK], peak = -INFINITY;
    for (int64_t b = 0; b < num_blocks; b++) {
        const float *block = x + b * BLOCK;
        for (int i = 0; i < BLOCK; i += 16) prefetch_l1(block + AHEAD * BLOCK + i);
        if ((b + 1) * BLOCK > vocab) load_block(x, vocab, b, NULL, 0, last), block = last;
        peaks[b] = block_peak(block);
        shares[b] = block_sum(block, peaks[b]);
        if (peaks[b] > peak) peak = peaks[b];
    }
    for (int64_t b = num_blocks; b < padded; b++) peaks[b] = -INFINITY, shares[b] = 0;
    if (peak == -INFINITY) return peak;
    VF total = vf_zero();
    for (int64_t b = 0; b < padded; b += VL) {
        const VF share = vf_mul(vf_load(shares + b), exp_negative(vf_sub(vf_load(peaks + b), vf_set1(peak))));
        vf_store(shares + b, share);
        total = vf_add(total, share);
    }
    const float sum = vf_sum(total);
    for (int64_t b = 0; b < padded; b += VL) vf_store(shares + b, vf_div(vf_load(shares + b), vf_set1(sum)));
    return peak + log(sum);
}

/* A row whose tokens are taken out, scanned. */
typedef struct {
    const float *x, *peaks, *shares;
    double norm;
    int64_t vocab;
} CandidateRow;

/* The place at which running sums of weights pass a point; the last weight that is no zero if rounding keeps them
 * below it; -1 if there is none. The sum before it is added to `before`. */
INLINE int64_t find(const double *weights, int64_t count, double point, double *before) {
    int64_t found = -1;
    double sum = 0, sum_found = 0;
    for (int64_t i = 0; i < count; i++) {
        if (weights[i] > 0) {
            found = i, sum_found = sum;
            if (point < sum + weights[i]) break;
        }
        sum += weights[i];
    }
    *before += sum_found;
    return found;
}

/* The sum of whole vectors of numbers. */
INLINE double sum_of(const double *x, int64_t count) {
    double sums[8] = {0};
    for (int64_t i = 0; i < count; i += 8)
        for (int a = 0; a < 8; a++) sums[a] += x[i + a];
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

/* The place of a token in its block, in two steps: a stretch of VL tokens, then the token. */
INLINE int64_t find_in_block(const float *probs, double share, double *sum) {
    double stretches[BLOCK / VL], inside[VL], before = 0;
    *sum = 0;
    for (int i = 0; i < BLOCK / VL; i++) *sum += stretches[i] = vf_sum(vf_load(probs + i * VL));
    const int64_t stretch = find(stretches, BLOCK / VL, share * *sum, &before);
    if (stretch < 0) return -1;
    for (int i = 0; i < VL; i++) inside[i] = probs[stretch * VL + i];
    return stretch * VL + find(inside, VL, share * *sum - before, &before);
}

static TARGET int64_t draw_token(const CandidateRow *u, const int64_t *out, int64_t num_out, double coin, double *weights) {
    const int64_t num_blocks = PADDED_BLOCKS(u->vocab);
    double before = 0, sum;
    const double point = coin * sum_of(weights, num_blocks);
    const int64_t block = find(weights, num_blocks, point, &before);
    if (block < 0) return -1;
    float probs[BLOCK];
    load_block(u->x, u->vocab, block, out, num_out, probs);
    for (int i = 0; i < BLOCK; i += VL)
        vf_store(probs + i, vf_exp(vf_sub(vf_load(probs + i), vf_set1((float)u->norm))));
    const int64_t place = find_in_block(probs, (point - before) / weights[block], &sum);
    if (place < 0) return -1;
    weights[block] = sum - probs[place];
    probs[place] = 0;
    if (weights[block] < 1e-3 * sum) { /* the difference has lost its precision */
        weights[block] = 0;
        for (int i = 0; i < BLOCK; i++) weights[block] += probs[i];
    }
    return block * BLOCK + place;
}

/* The place of the first number that equals another one, -1 if there is none; `count` is whole vectors. */
INLINE int64_t first_equal(const float *x, int64_t count, float wanted) {
    for (int64_t at = 0; at < count; at += VL) {
        const uint32_t found = vf_equal(vf_load(x + at), vf_set1(wanted));
        if (found) return at + __builtin_ctz(found);
    }
    return -1;
}

static TARGET int64_t best_token(const CandidateRow *u, const int64_t *out, int64_t num_out, float *peaks) {
    const int64_t num_blocks = PADDED_BLOCKS(u->vocab);
    VF best = vf_load(peaks);
    for (int64_t b = VL; b < num_blocks; b += VL) best = vf_max(best, vf_load(peaks + b));
    const float peak = vf_peak(best);
    if (!(peak > -INFINITY)) return -1;
    const int64_t block = first_equal(peaks, num_blocks, peak);
    float scores[BLOCK];
    load_block(u->x, u->vocab, block, out, num_out, scores);
    const int64_t place = first_equal(scores, BLOCK, peak);
    if (place < 0) return -1; /* the scores are not those that were scanned */
    scores[place] = -INFINITY;
    peaks[block] = block_peak(scores);
    return block * BLOCK + place;
}

/* The next tokens of a row, drawn without replacement, or the likeliest if there are no coins. `out` holds the
 * num_out tokens that were taken before and has room for `count` more. Where nothing is left the probability is 0.
 * `scratch` has room for twice as many numbers as there are blocks (padded). */
static TARGET void take_tokens(const CandidateRow *u, int64_t *out, int64_t num_out, int64_t count, const double *coins,
                               int64_t *tokens, double *probs, double *scratch) {
    const int64_t num_blocks = PADDED_BLOCKS(u->vocab);
    double *weights = scratch;
    float *peaks = (float *)(scratch + num_blocks), scores[BLOCK];
    memcpy(peaks, u->peaks, (size_t)num_blocks * sizeof(float));
    for (int64_t b = 0; coins && b < num_blocks; b++) weights[b] = u->shares[b];
    for (int64_t i = 0; i < num_out; i++) {
        const int64_t b = out[i] / BLOCK;
        load_block(u->x, u->vocab, b, out, num_out, scores);
        peaks[b] = block_peak(scores);
        if (coins) weights[b] = block_sum(scores, peaks[b]) * exp(peaks[b] - u->norm);
    }
    for (int64_t k = 0; k < count; k++) {
        const int64_t token = coins ? draw_token(u, out, num_out, coins[k], weights) : best_token(u, out, num_out, peaks);
        tokens[k] = token < 0 ? 0 : token;
        probs[k] = token < 0 || isnan(u->norm) ? 0 : exp(u->x[token] - u->norm);
        if (token >= 0) out[num_out++] = token;
    }
}

/* Takes the next tokens of some slots (see take_tokens); a slot that nothing was taken from yet is scanned first. */
static TARGET void take_from(const Candidates *u, const int64_t *slots, int64_t num_slots, const Taken *taken, int64_t count,
                             const double *coins, int64_t *tokens, double *probs) {
    const int64_t padded = PADDED_BLOCKS(u->vocab);
    double *scratch = take((size_t)(2 * padded) * sizeof(double));
    int64_t *out = take((size_t)(taken->room + count) * sizeof(int64_t));
    for (int64_t i = 0; i < num_slots; i++) {
        const int64_t slot = slots[i], num_taken = taken->room ? taken->counts[i] : 0;
        const float *x = u->x + slot * u->vocab;
        float *peaks = u->peaks + slot * padded, *shares = u->shares + slot * padded;
        if (isnan(u->norms[slot])) u->norms[slot] = scan_row(x, u->vocab, peaks, shares);
        if (num_taken) memcpy(out, taken->tokens + i * taken->room, (size_t)num_taken * sizeof(int64_t));
        const CandidateRow row = {x, peaks, shares, u->norms[slot], u->vocab};
        take_tokens(&row, out, num_taken, count, coins ? coins + i * count : NULL, tokens + i * count,
                    probs + i * count, scratch);
    }
}

/* The first of the greatest scores, -1 if one is not a number. */
static TARGET int64_t argmax_row(const float *x, int64_t vocab) {
    const int64_t num_blocks = (vocab + BLOCK - 1) / BLOCK;
    float last[BLOCK], peak = -INFINITY;
    int64_t best = 0;
    int32_t wrong = 0;
    for (int64_t b = 0; b < num_blocks; b++) {
        const float *block = x + b * BLOCK;
        for (int i = 0; i < BLOCK; i += 16) prefetch_l1(block + AHEAD * BLOCK + i);
        if ((b + 1) * BLOCK > vocab) load_block(x, vocab, b, NULL, 0, last), block = last;
        for (int i = 0; i < BLOCK; i++) wrong |= block[i] != block[i];
        const float here = block_peak(block);
        if (here > peak) peak = here, best = b;
    }
    if (wrong) return -1;
    for (int64_t i = best * BLOCK; i < vocab; i++)
        if (x[i] == peak) return i;
    return best * BLOCK;
}

/* From the root on to the child that holds the greatest score, while there is one. */
static TARGET void walk_tree(Verification *v) {
    int64_t slot = 0;
    v->count = 0;
    for (;;) {
        v->next = argmax_row(v->p + slot * v->vocab, v->vocab);
        int64_t child = v->first_child[slot];
        while (child && v->tokens[child - 1] != v->next) child = v->next_sibling[child];
        if (!child || v->next < 0) return;
        v->path[v->count++] = (slot = child) - 1;
    }
}

/* e^(x - norm) of a row. */
static TARGET void exp_row(const float *x, int64_t vocab, double norm, float *out) {
    const VF shift = vf_set1((float)norm);
    const int64_t whole = vocab / VL * VL;
    float part[VL];
    for (int64_t i = 0; i < whole; i += VL) vf_store(out + i, vf_exp(vf_sub(vf_load(x + i), shift)));
    for (int64_t i = 0; i < VL; i++) part[i] = whole + i < vocab ? x[whole + i] : -INFINITY;
    vf_store(part, vf_exp(vf_sub(vf_load(part), shift)));
    memcpy(out + whole, part, (size_t)(vocab - whole) * sizeof(float));
}

/* What verification knows of a slot: p and q are probabilities of tokens, or, once a child was refused, whole rows. */
typedef struct {
    const float *x, *y; /* scores of the target and of the draft */
    double x_norm, y_norm;
    float *p, *q;            /* NULL until a child is refused */
    double p_mass, q_mass;   /* sums of p and q */
} Slot;

/* p <- max(e^(x - x_norm) - factor * q, 0) and q <- e^(y - y_norm), which then loses a token; the sums of p and q. */
static TARGET void subtract_first(Slot *s, int64_t vocab, float factor, int64_t token) {
    const VF f = vf_set1(factor), x_norm = vf_set1((float)s->x_norm), y_norm = vf_set1((float)s->y_norm);
    s->p_mass = s->q_mass = 0;
    for (int64_t first = 0; first < vocab; first += BLOCK) {
        const int64_t count = vocab - first < BLOCK ? vocab - first : BLOCK;
        const float *x = s->x + first, *y = s->y + first;
        float *p = s->p + first, *q = s->q + first, last[4][BLOCK];
        if (count < BLOCK) {
            load_block(s->x, vocab, first / BLOCK, NULL, 0, last[0]), load_block(s->y, vocab, first / BLOCK, NULL, 0, last[1]);
            x = last[0], y = last[1], p = last[2], q = last[3];
        }
        for (int i = 0; i < BLOCK; i += 16) prefetch_l1(y + AHEAD * BLOCK + i);
        VF ps = vf_zero(), qs = vf_zero();
        for (int i = 0; i < BLOCK; i += VL) {
            const VF q_here = vf_exp(vf_sub(vf_load(y + i), y_norm));
            const VF left = vf_max(vf_fnma(f, q_here, vf_exp(vf_sub(vf_load(x + i), x_norm))), vf_zero());
            vf_store(p + i, left), vf_store(q + i, q_here);
            ps = vf_add(ps, left), qs = vf_add(qs, q_here);
        }
        if (token >= first && token < first + count) { /* to subtract it from the sum could leave nothing but rounding */
            q[token - first] = 0, qs = vf_zero();
            for (int i = 0; i < BLOCK; i += VL) qs = vf_add(qs, vf_load(q + i));
        }
        s->p_mass += vf_sum(ps), s->q_mass += vf_sum(qs);
        if (count < BLOCK) {
            memcpy(s->p + first, p, (size_t)count * sizeof(float));
            memcpy(s->q + first, q, (size_t)count * sizeof(float));
        }
    }
}

/* p <- max(p - factor * q, 0); the sums of p and q. */
static TARGET void subtract(float *p, const float *q, int64_t vocab, float factor, double *p_sum, double *q_sum) {
    *p_sum = *q_sum = 0;
    const VF f = vf_set1(factor);
    const int64_t whole = vocab / VL * VL;
    for (int64_t first = 0; first < whole; first += BLOCK) {
        VF ps = vf_zero(), qs = vf_zero();
        for (int64_t i = first; i < whole && i < first + BLOCK; i += VL) {
            VF q_here = vf_load(q + i), left = vf_max(vf_fnma(f, q_here, vf_load(p + i)), vf_zero());
            vf_store(p + i, left);
            ps = vf_add(ps, left);
            qs = vf_add(qs, q_here);
        }
        *p_sum += vf_sum(ps);
        *q_sum += vf_sum(qs);
    }
    for (int64_t i = whole; i < vocab; i++) {
        p[i] = p[i] - factor * q[i] > 0 ? p[i] - factor * q[i] : 0;
        *p_sum += p[i];
        *q_sum += q[i];
    }
}

static TARGET double norm_of(const Verification *v, const float *x) {
    return scan_row(x, v->vocab, v->scratch, v->scratch + PADDED_BLOCKS(v->vocab));
}

static TARGET Slot enter(const Verification *v, int64_t slot) {
    const float *x = v->p + slot * v->vocab;
    return (Slot){x, v->q[slot], norm_of(v, x), norm_of(v, v->q[slot]), NULL, NULL, 1, 1};
}

/* The chance of a child whose parent has a reach. */
static TARGET double chance_of(const Slot *s, int64_t token, double reach) {
    const double p = s->p ? s->p[token] : exp(s->x[token] - s->x_norm);
    const double q = s->q ? s->q[token] : exp(s->y[token] - s->y_norm);
    const double chance = reach * p / q * s->q_mass / s->p_mass;
    return chance < 1 ? chance : 1;
}

/* p becomes what the target still wants once the draft has had its say, q loses the token. Returns the new reach. */
static TARGET double refuse(const Verification *v, Slot *s, int64_t token, double reach, int64_t depth) {
    const double before = s->p_mass;
    const float factor = reach > 0 ? (float)(before / s->q_mass / reach) : 0;
    if (!s->p) {
        s->p = v->rows + 2 * depth * v->vocab, s->q = s->p + v->vocab;
        subtract_first(s, v->vocab, factor, token);
    } else {
        const float left_here = s->p[token] - factor * s->q[token];
        s->p[token] = left_here > 0 ? left_here : 0;
        s->q[token] = 0;
        subtract(s->p, s->q, v->vocab, factor, &s->p_mass, &s->q_mass);
    }
    const double left = before > 0 ? reach * s->p_mass / before : 0, whole = left + 1 - reach;
    return whole > 0 ? left / whole : 0;
}

/* A token drawn in proportion to weights; `sums` has room for a number a block. */
static TARGET int64_t draw_weighted(const float *weights, int64_t vocab, double coin, double *sums) {
    const int64_t num_blocks = NUM_BLOCKS(vocab);
    double total = 0, before = 0, inside[BLOCK] = {0};
    for (int64_t b = 0; b < num_blocks; b++) {
        float last[BLOCK] = {0};
        const float *block = weights + b * BLOCK;
        if ((b + 1) * BLOCK > vocab) block = memcpy(last, block, (size_t)(vocab - b * BLOCK) * sizeof(float));
        VF sum[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
        for (int i = 0; i < BLOCK; i += 4 * VL)
            for (int a = 0; a < 4; a++) sum[a] = vf_add(sum[a], vf_load(block + i + a * VL));
        total += sums[b] = vf_sum(vf_add(vf_add(sum[0], sum[1]), vf_add(sum[2], sum[3])));
    }
    const int64_t block = find(sums, num_blocks, coin * total, &before);
    if (block < 0) return 0;
    const int64_t first = block * BLOCK, count = vocab - first < BLOCK ? vocab - first : BLOCK;
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += inside[i] = weights[first + i];
    return first + find(inside, count, (coin * total - before) / sums[block] * sum, &before);
}

/* The token after the path: from what is left of p, or from all of it where no child was refused (or nothing is left
 * because p and q are equal up to rounding); -1 if the target's scores are no numbers. */
static TARGET int64_t draw_next(const Verification *v, const Slot *s, int64_t slot) {
    const float *x = v->p + slot * v->vocab;
    const int64_t best = argmax_row(x, v->vocab);
    if (best < 0 || !isfinite(x[best])) return -1;
    float *p = s ? s->p : NULL;
    if (!p || !(s->p_mass > 0)) {
        if (!p) p = v->rows; /* nobody needs what was there any more */
        exp_row(x, v->vocab, s ? s->x_norm : norm_of(v, x), p);
    }
    return draw_weighted(p, v->vocab, v->coins[v->num_slots], (double *)v->scratch);
}

static TARGET void verify_topdown(Verification *v) {
    int64_t slot = 0;
    Slot here = {0};
    v->count = 0;
    for (int64_t child; (child = v->first_child[slot]);) {
        here = enter(v, slot);
        while (child && !(v->coins[child] < chance_of(&here, v->tokens[child - 1], 1))) {
            refuse(v, &here, v->tokens[child - 1], 1, 0);
            child = here.p_mass > 0 ? v->next_sibling[child] : 0;
        }
        if (!child) break;
        v->path[v->count++] = (slot = child) - 1;
    }
    v->next = draw_next(v, v->first_child[slot] ? &here : NULL, slot);
}

/* Tries all that hangs on a slot, and then the slot itself; whether the path ends there. */
static TARGET int visit(Verification *v, int64_t slot, double reach, int64_t depth) {
    Slot here = {0};
    int64_t child = v->first_child[slot];
    if (child) here = enter(v, slot);
    for (; child && reach > 0; child = v->next_sibling[child]) {
        v->path[depth] = child - 1;
        if (visit(v, child, chance_of(&here, v->tokens[child - 1], reach), depth + 1)) return 1;
        reach = refuse(v, &here, v->tokens[child - 1], reach, depth);
    }
    if (slot && !(v->coins[slot] < reach)) return 0;
    v->count = depth;
    v->next = draw_next(v, v->first_child[slot] ? &here : NULL, slot);
    return 1;
}

static TARGET void verify_traversal(Verification *v) { visit(v, 0, 1, 0); }

static TARGET void verify(Verification *v, int rule) {
    v->first_child = take((size_t)(2 * v->num_slots) * sizeof(int64_t));
    memset(v->first_child, 0, (size_t)(2 * v->num_slots) * sizeof(int64_t));
    v->next_sibling = v->first_child + v->num_slots;
    for (int64_t slot = v->size; slot; slot--) {
        const int64_t parent = v->parents[slot - 1] + 1;
        v->next_sibling[slot] = v->first_child[parent], v->first_child[parent] = slot;
    }
    v->scratch = take((size_t)(2 * PADDED_BLOCKS(v->vocab)) * sizeof(float));
    if (rule) v->rows = take((size_t)((rule == 1 ? 1 : v->depth + 1) * 2 * v->vocab) * sizeof(float));
    (rule == 0 ? walk_tree : rule == 1 ? verify_topdown : verify_traversal)(v);
}
