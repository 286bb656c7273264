/* Tokens drawn from distributions that are given by their scores, and the verification of the trees they make. One
 * thread, one pass over a row of scores for each question; what trees.Urn and specdec.acceptance do with torch. */

#define BLOCK 256 /* tokens whose weights are known as a sum; a token is found in its block */

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

/* The sum of e^(x - peak). */
INLINE float block_sum(const float *x, float peak) {
    if (peak == -INFINITY) return 0;
    VF sum[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()}, shift = vf_set1(peak);
    for (int i = 0; i < BLOCK; i += 4 * VL)
        for (int a = 0; a < 4; a++) sum[a] = vf_add(sum[a], vf_exp(vf_sub(vf_load(x + i + a * VL), shift)));
    return vf_sum(vf_add(vf_add(sum[0], sum[1]), vf_add(sum[2], sum[3])));
}

/* Peak and sum of every block; returns the logarithm of the sum of e^x over the row. */
static TARGET double scan_row(const float *x, int64_t vocab, float *peaks, float *sums) {
    const int64_t num_blocks = (vocab + BLOCK - 1) / BLOCK;
    float last[BLOCK], peak = -INFINITY;
    for (int64_t b = 0; b < num_blocks; b++) {
        const float *block = x + b * BLOCK;
        if ((b + 1) * BLOCK > vocab) load_block(x, vocab, b, NULL, 0, last), block = last;
        peaks[b] = block_peak(block);
        sums[b] = block_sum(block, peaks[b]);
        if (peaks[b] > peak) peak = peaks[b];
    }
    double total = 0;
    for (int64_t b = 0; b < num_blocks; b++)
        if (sums[b]) total += sums[b] * exp((double)peaks[b] - peak);
    return peak + log(total);
}

static TARGET void scan(const float *x, int64_t rows, int64_t vocab, float *peaks, float *sums, double *norms) {
    const int64_t num_blocks = (vocab + BLOCK - 1) / BLOCK;
    for (int64_t row = 0; row < rows; row++)
        norms[row] = scan_row(x + row * vocab, vocab, peaks + row * num_blocks, sums + row * num_blocks);
}

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

static TARGET int64_t draw_token(const UrnRow *u, const int64_t *out, int64_t num_out, double coin, double *weights) {
    const int64_t num_blocks = (u->vocab + BLOCK - 1) / BLOCK;
    double total = 0, before = 0, inside[BLOCK];
    for (int64_t b = 0; b < num_blocks; b++) total += weights[b];
    const int64_t block = find(weights, num_blocks, coin * total, &before);
    if (block < 0) return -1;
    float scores[BLOCK];
    load_block(u->x, u->vocab, block, out, num_out, scores);
    for (int i = 0; i < BLOCK; i += VL)
        vf_store(scores + i, vf_exp(vf_sub(vf_load(scores + i), vf_set1((float)u->norm))));
    double sum = 0;
    for (int i = 0; i < BLOCK; i++) sum += inside[i] = scores[i];
    const double share = weights[block] > 0 ? (coin * total - before) / weights[block] : 0;
    const int64_t place = find(inside, BLOCK, share * sum, &before);
    if (place < 0) return -1;
    weights[block] = sum - inside[place];
    inside[place] = 0;
    if (weights[block] < 1e-3 * sum) { /* the difference has lost its precision */
        weights[block] = 0;
        for (int i = 0; i < BLOCK; i++) weights[block] += inside[i];
    }
    return block * BLOCK + place;
}

/* The next tokens of a row, drawn without replacement, or the likeliest if there are no coins. `out` holds the
 * num_out tokens that were taken before and has room for `count` more. Where nothing is left the probability is 0.
 * `scratch` has room for twice as many numbers as there are blocks. */
static TARGET void take_tokens(const UrnRow *u, int64_t *out, int64_t num_out, int64_t count, const double *coins,
                               int64_t *tokens, double *probs, double *scratch) {
    const int64_t num_blocks = (u->vocab + BLOCK - 1) / BLOCK;
    double *weights = scratch;
    float *peaks = (float *)(scratch + num_blocks), scores[BLOCK];
    memcpy(peaks, u->peaks, (size_t)num_blocks * sizeof(float));
    for (int64_t b = 0; coins && b < num_blocks; b++)
        weights[b] = u->sums[b] ? u->sums[b] * exp(u->peaks[b] - u->norm) : 0;
    for (int64_t i = 0; i < num_out; i++) {
        const int64_t b = out[i] / BLOCK;
        load_block(u->x, u->vocab, b, out, num_out, scores);
        peaks[b] = block_peak(scores);
        if (coins) weights[b] = block_sum(scores, peaks[b]) * exp(peaks[b] - u->norm);
    }
    for (int64_t k = 0; k < count; k++) {
        int64_t token = -1;
        if (coins) {
            token = draw_token(u, out, num_out, coins[k], weights);
        } else {
            int64_t best = 0;
            for (int64_t b = 1; b < num_blocks; b++)
                if (peaks[b] > peaks[best]) best = b;
            load_block(u->x, u->vocab, best, out, num_out, scores);
            for (int i = 0; token < 0 && i < BLOCK; i++)
                if (scores[i] == peaks[best] && scores[i] > -INFINITY) token = best * BLOCK + i, scores[i] = -INFINITY;
            peaks[best] = block_peak(scores);
        }
        tokens[k] = token < 0 ? 0 : token;
        probs[k] = token < 0 ? 0 : exp(u->x[token] - u->norm);
        if (token >= 0) out[num_out++] = token;
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
        while (child && v->tokens[child] != v->next) child = v->next_sibling[child];
        if (!child || v->next < 0) return;
        v->path[v->count++] = slot = child;
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

/* What verification knows of a slot: p and q are probabilities of tokens, or, once a child was refused, whole rows. */
typedef struct {
    const float *x, *y; /* scores of the target and of the draft */
    double x_norm, y_norm;
    float *p, *q;            /* NULL until a child is refused */
    double p_mass, q_mass;   /* sums of p and q */
} Slot;

static TARGET double norm_of(const Verification *v, const float *x) {
    return scan_row(x, v->vocab, v->scratch, v->scratch + (v->vocab + BLOCK - 1) / BLOCK);
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
    if (!s->p) {
        s->p = v->rows + 2 * depth * v->vocab, s->q = s->p + v->vocab;
        exp_row(s->x, v->vocab, s->x_norm, s->p);
        exp_row(s->y, v->vocab, s->y_norm, s->q);
    }
    const double before = s->p_mass;
    const float factor = reach > 0 ? (float)(before / s->q_mass / reach) : 0;
    const float left_here = s->p[token] - factor * s->q[token];
    s->p[token] = left_here > 0 ? left_here : 0;
    s->q[token] = 0;
    subtract(s->p, s->q, v->vocab, factor, &s->p_mass, &s->q_mass);
    const double left = before > 0 ? reach * s->p_mass / before : 0, whole = left + 1 - reach;
    return whole > 0 ? left / whole : 0;
}

/* The token after the path: from what is left of p, or from all of it where no child was refused (or nothing is left
 * because p and q are equal up to rounding). */
static TARGET int64_t draw_next(const Verification *v, const Slot *s, int64_t slot) {
    const float *x = v->p + slot * v->vocab;
    float *p = s ? s->p : NULL;
    if (!p || !(s->p_mass > 0)) {
        if (!p) p = v->rows; /* nobody needs what was there any more */
        exp_row(x, v->vocab, s ? s->x_norm : norm_of(v, x), p);
    }
    double sum = 0, coin = v->coins[v->num_slots];
    for (int64_t i = 0; i < v->vocab; i++) sum += p[i];
    double point = coin * sum;
    int64_t found = 0;
    for (int64_t i = 0; i < v->vocab; i++) {
        if (p[i] > 0) found = i;
        if ((point -= p[i]) < 0) return found;
    }
    return found;
}

static TARGET void verify_topdown(Verification *v) {
    int64_t slot = 0;
    Slot here = {0};
    v->count = 0;
    for (int64_t child; (child = v->first_child[slot]);) {
        here = enter(v, slot);
        while (child && !(v->coins[child] < chance_of(&here, v->tokens[child], 1))) {
            refuse(v, &here, v->tokens[child], 1, 0);
            child = here.p_mass > 0 ? v->next_sibling[child] : 0;
        }
        if (!child) break;
        v->path[v->count++] = slot = child;
    }
    v->next = draw_next(v, v->first_child[slot] ? &here : NULL, slot);
}

/* Tries all that hangs on a slot, and then the slot itself; whether the path ends there. */
static TARGET int visit(Verification *v, int64_t slot, double reach, int64_t depth) {
    Slot here = {0};
    int64_t child = v->first_child[slot];
    if (child) here = enter(v, slot);
    for (; child && reach > 0; child = v->next_sibling[child]) {
        v->path[depth] = child;
        if (visit(v, child, chance_of(&here, v->tokens[child], reach), depth + 1)) return 1;
        reach = refuse(v, &here, v->tokens[child], reach, depth);
    }
    if (slot && !(v->coins[slot] < reach)) return 0;
    v->count = depth;
    v->next = draw_next(v, v->first_child[slot] ? &here : NULL, slot);
    return 1;
}

static TARGET void verify_traversal(Verification *v) { visit(v, 0, 1, 0); }

static TARGET void verify(Verification *v, int rule) {
    v->scratch = take((size_t)(2 * ((v->vocab + BLOCK - 1) / BLOCK)) * sizeof(float));
    if (rule) v->rows = take((size_t)((rule == 1 ? 1 : v->depth + 1) * 2 * v->vocab) * sizeof(float));
    (rule == 0 ? walk_tree : rule == 1 ? verify_topdown : verify_traversal)(v);
}
