/* Trees grown by the rules of trees.dynamic.ValueGrower and trees.static.ShapedGrower, which are explained there; those
 * classes are the oracles. Slot 0 is the root, slot i the i-th node that was made. */

typedef struct {
    int64_t token, parent, depth, place, layer, column;
    int64_t last_child, elder, num_children; /* slots; 0 is none */
    int64_t spot;                            /* in the shape, if there is one */
    double prob, value, reach, bound, left;
    UrnRow urn; /* urn.x is NULL until the slot is scored */
    float *peaks;
    double *weights;
} GrowingSlot;

typedef struct {
    double value;
    int64_t ticket, slot;
} Offer;

/* Memory that lasts as long as the tree. */
typedef struct Chunk {
    struct Chunk *next;
} Chunk;

struct GrowingTree {
    TreeSettings settings;
    double guess;
    int64_t num_slots, num_offers, num_values, num_waiting, num_tickets, num_places, num_layers;
    int64_t slot_room, offer_room, waiting_room, scored_room, gone_room;
    GrowingSlot *slots;
    Offer *offers;    /* a heap, the greatest value on top */
    double *values;   /* a heap of the greatest values so far, the least of them on top */
    int64_t *waiting; /* slots that are to be scored next */
    int64_t *scored;  /* those that have just been scored */
    int64_t *gone;    /* tokens of a slot's children, for a moment */
    Chunk *chunks;
};

/* Whether an array has room for `needed` items; one that has not grows. Without memory for that it stays as it was. */
#define HAS_ROOM(items, room, needed) ((needed) <= (room) || grow_array(&(items), &(room), needed, sizeof *(items)))

static int grow_array(void *items, int64_t *room, int64_t needed, size_t size) {
    const int64_t new_room = 2 * needed > 256 ? 2 * needed : 256;
    void *old, *new; /* copied, because `items` points to pointers of any type */
    memcpy(&old, items, sizeof old);
    if (!(new = reallocate(old, (size_t)new_room * size))) return 0;
    memcpy(items, &new, sizeof new);
    *room = new_room;
    return 1;
}

/* Whether there is room for a step: one more child of a slot that has `num_children`, two offers, a slot that waits. */
static int has_room(GrowingTree *t, int64_t num_children) {
    return HAS_ROOM(t->slots, t->slot_room, t->num_slots + 1) && HAS_ROOM(t->offers, t->offer_room, t->num_offers + 2) &&
           HAS_ROOM(t->waiting, t->waiting_room, t->num_waiting + 1) && HAS_ROOM(t->gone, t->gone_room, num_children + 1);
}

/* This and what follows add to arrays that have room: see has_room(). */
static GrowingSlot *add_slot(GrowingTree *t) {
    GrowingSlot *slot = t->slots + t->num_slots++;
    *slot = (GrowingSlot){.place = -1, .left = 1};
    return slot;
}

static void wait_for_scores(GrowingTree *t, int64_t slot) {
    t->waiting[t->num_waiting++] = slot;
}

static void free_tree(GrowingTree *t) {
    for (Chunk *chunk = t->chunks, *next; chunk; chunk = next) next = chunk->next, free(chunk);
    free(t->slots), free(t->offers), free(t->values), free(t->waiting), free(t->scored), free(t->gone), free(t);
}

static GrowingTree *new_tree(const TreeSettings *settings) {
    GrowingTree *t = allocate(sizeof(GrowingTree));
    if (!t) return NULL;
    *t = (GrowingTree){.settings = *settings, .guess = settings->guess};
    t->values = allocate((size_t)(settings->limit + 1) * sizeof(double));
    if (!t->values || !has_room(t, 0)) return free_tree(t), NULL;
    GrowingSlot *root = add_slot(t);
    root->value = root->reach = root->bound = 1;
    wait_for_scores(t, 0);
    return t;
}

static int is_before(const Offer *a, const Offer *b) {
    return a->value > b->value || (a->value == b->value && a->ticket < b->ticket);
}

static void offer(GrowingTree *t, int64_t slot, double value) {
    const Offer new = {value, t->num_tickets++, slot};
    int64_t at = t->num_offers++;
    for (; at && is_before(&new, t->offers + (at - 1) / 2); at = (at - 1) / 2) t->offers[at] = t->offers[(at - 1) / 2];
    t->offers[at] = new;
}

static void drop_best_offer(GrowingTree *t) {
    const Offer last = t->offers[--t->num_offers];
    int64_t at = 0;
    for (int64_t child; (child = 2 * at + 1) < t->num_offers; at = child) {
        if (child + 1 < t->num_offers && is_before(t->offers + child + 1, t->offers + child)) child++;
        if (!is_before(t->offers + child, &last)) break;
        t->offers[at] = t->offers[child];
    }
    t->offers[at] = last;
}

static void note_value(GrowingTree *t, double value) {
    double *values = t->values;
    if (t->num_values < t->settings.limit) {
        int64_t at = t->num_values++;
        for (; at && value < values[(at - 1) / 2]; at = (at - 1) / 2) values[at] = values[(at - 1) / 2];
        values[at] = value;
        return;
    }
    int64_t at = 0; /* the least one goes */
    for (int64_t child; (child = 2 * at + 1) < t->num_values; at = child) {
        if (child + 1 < t->num_values && values[child + 1] < values[child]) child++;
        if (value <= values[child]) break;
        values[at] = values[child];
    }
    values[at] = value;
}

static int wants(const GrowingTree *t, double value) {
    return value >= t->settings.threshold && (t->num_values < t->settings.limit || value > t->values[0]);
}

static TARGET double next_value(const GrowingTree *t, const GrowingSlot *s) {
    double mass = s->left;
    if (!t->settings.sample) {
        VF best = vf_load(s->peaks);
        for (int64_t b = VL; b < PADDED_BLOCKS(s->urn.vocab); b += VL) best = vf_max(best, vf_load(s->peaks + b));
        const float peak = vf_peak(best);
        mass = peak > -INFINITY ? exp(peak - s->urn.norm) : 0;
    }
    return s->reach * mass < s->bound ? s->reach * mass : s->bound;
}

/* Reads the scores after a slot; whether there was memory for it. */
static TARGET int score_slot(GrowingTree *t, int64_t slot, const float *x) {
    const int64_t vocab = t->settings.vocab, padded = PADDED_BLOCKS(vocab);
    const size_t peaks_bytes = (size_t)(2 * padded) * sizeof(float);
    Chunk *chunk = allocate(sizeof(Chunk) + peaks_bytes + (t->settings.sample ? (size_t)padded * sizeof(double) : 0));
    if (!chunk) return 0;
    chunk->next = t->chunks, t->chunks = chunk;
    GrowingSlot *s = t->slots + slot;
    float *shares = (s->peaks = (float *)(chunk + 1)) + padded;
    s->urn = (UrnRow){x, s->peaks, shares, scan_row(x, vocab, s->peaks, shares), vocab};
    s->weights = (double *)(shares + padded);
    for (int64_t b = 0; t->settings.sample && b < padded; b++) s->weights[b] = shares[b];
    return 1;
}

/* A slot's next child; 0 if there is none. */
static TARGET int64_t take_child(GrowingTree *t, int64_t slot, const double **coins) {
    GrowingSlot *s = t->slots + slot;
    const double value = next_value(t, s);
    int64_t num_gone = 0, *gone = t->gone;
    for (int64_t child = s->last_child; child; child = t->slots[child].elder) gone[num_gone++] = t->slots[child].token;
    const int64_t token = t->settings.sample ? draw_token(&s->urn, gone, num_gone, *(*coins)++, s->weights)
                                             : best_token(&s->urn, gone, num_gone, s->peaks);
    const double prob = token < 0 ? 0 : exp(s->urn.x[token] - s->urn.norm);
    if (!(prob > 0)) return 0;
    const int64_t number = t->num_slots;
    GrowingSlot *child = add_slot(t);
    child->token = token, child->parent = slot, child->depth = s->depth + 1, child->elder = s->last_child;
    child->prob = prob, child->value = value, child->reach = s->reach * prob;
    child->bound = value < child->reach ? value : child->reach;
    s->last_child = number, s->num_children++, s->bound = value;
    s->left = s->left > prob ? s->left - prob : 0;
    return number;
}

/* Gives slots the children that the shape wants, one coin each; those that shall have children too wait. Returns
 * whether there was memory for it. */
static TARGET int fill_shape(GrowingTree *t, const int64_t *slots, int64_t num_slots, const double *coins) {
    const TreeSettings *all = &t->settings;
    for (int64_t i = 0; i < num_slots; i++) {
        const int64_t spot = t->slots[slots[i]].spot;
        for (int64_t k = all->starts[spot]; k < all->starts[spot + 1]; k++) {
            if (!has_room(t, t->slots[slots[i]].num_children)) return 0;
            const int64_t child = take_child(t, slots[i], &coins), here = all->spots[k];
            if (!child) break;
            t->slots[child].spot = here;
            if (all->starts[here] < all->starts[here + 1] && t->slots[child].depth < all->max_depth)
                wait_for_scores(t, child);
        }
    }
    return 1;
}

/* Takes offers, the best first. Returns the number of slots that wait for their scores, -1 where coins are wanting
 * (or OUT_OF_MEMORY). */
static TARGET int64_t collect(GrowingTree *t, const double *coins, int64_t num_coins) {
    const double *end = coins + num_coins;
    while (t->num_offers) {
        const Offer best = t->offers[0];
        if (!wants(t, best.value)) break;
        if (best.value < t->guess) {
            if (t->num_waiting) break;
            t->guess = best.value / 2;
        }
        if (!has_room(t, t->slots[best.slot].num_children)) return OUT_OF_MEMORY;
        if (!t->slots[best.slot].urn.x) {
            drop_best_offer(t);
            wait_for_scores(t, best.slot);
            continue;
        }
        if (t->settings.sample && coins == end) return -1;
        drop_best_offer(t);
        const int64_t child = take_child(t, best.slot, &coins);
        if (!child) continue;
        note_value(t, t->slots[child].value);
        offer(t, best.slot, next_value(t, t->slots + best.slot));
        if (t->slots[child].depth < t->settings.max_depth) offer(t, child, t->slots[child].bound);
    }
    return t->num_waiting;
}

/* The slots that waited have been scored: others may wait from now on. */
static void close_layer(GrowingTree *t) {
    int64_t *scored = t->waiting, room = t->waiting_room;
    t->waiting = t->scored, t->waiting_room = t->scored_room;
    t->scored = scored, t->scored_room = room;
    t->num_waiting = 0, t->num_layers++;
}

/* Grows a layer, given the scores after the slots that wait, or goes on with more coins (x is NULL). See collect(). */
static TARGET int64_t grow_tree(GrowingTree *t, const float *x, const double *coins, int64_t num_coins) {
    const int64_t num_scored = x ? t->num_waiting : 0;
    for (int64_t i = 0; i < num_scored; i++) {
        GrowingSlot *s = t->slots + t->waiting[i];
        s->layer = t->num_layers, s->column = i;
        if (!t->settings.starts && !wants(t, s->bound)) continue;
        if (!score_slot(t, t->waiting[i], x + i * t->settings.vocab)) return OUT_OF_MEMORY;
    }
    if (x) close_layer(t);
    if (t->settings.starts && !fill_shape(t, t->scored, num_scored, coins)) return OUT_OF_MEMORY;
    for (int64_t i = 0; i < num_scored && !t->settings.starts; i++) {
        const GrowingSlot *s = t->slots + t->scored[i];
        if (!s->urn.x) continue;
        if (!has_room(t, 0)) return OUT_OF_MEMORY;
        offer(t, t->scored[i], next_value(t, s));
    }
    return collect(t, coins, num_coins);
}

/* Gives the slots that wait their places, and writes tokens, parents' places, depths, and which of the root and all
 * places so far each sees (`seen` is zero before). Filled up to `width` with children of the root. */
static void write_layer(GrowingTree *t, int64_t width, int64_t spare, const NextLayer *out) {
    const int64_t num_seen = 1 + t->num_places + width;
    int64_t *tokens = out->numbers + out->row * width;
    int64_t *parents = tokens + out->num_rows * width, *depths = parents + out->num_rows * width;
    if (t->num_slots > 1) spare = t->slots[1].token; /* the root's first child */
    for (int64_t i = 0; i < width; i++) {
        uint8_t *seen = out->seen + (out->row * width + i) * num_seen;
        tokens[i] = spare, parents[i] = -1, depths[i] = 1;
        seen[0] = seen[1 + t->num_places + i] = 1;
        if (i >= t->num_waiting) continue;
        GrowingSlot *s = t->slots + t->waiting[i];
        s->place = t->num_places + i;
        tokens[i] = s->token, parents[i] = t->slots[s->parent].place, depths[i] = s->depth;
        for (int64_t above = s->parent; above; above = t->slots[above].parent) seen[1 + t->slots[above].place] = 1;
    }
    t->num_places += width;
}

static int by_value(const void *a, const void *b) { return is_before(a, b) ? -1 : 1; }

/* Writes the nodes that stay, depth first, first children first; returns their number, the settings' limit at most, or
 * OUT_OF_MEMORY. */
static int64_t finish_tree(const GrowingTree *t, FinishedTree *out) {
    const int64_t num_nodes = t->num_slots - 1;
    const int64_t num_kept = num_nodes < t->settings.limit ? num_nodes : t->settings.limit;
    const size_t links_bytes = (size_t)(3 * t->num_slots) * sizeof(int64_t);
    Offer *order = allocate((size_t)num_nodes * sizeof(Offer) + links_bytes);
    if (!order) return OUT_OF_MEMORY;
    int64_t *is_kept = (int64_t *)(order + num_nodes), *number = is_kept + t->num_slots, *open = number + t->num_slots;
    memset(is_kept, 0, links_bytes);
    for (int64_t i = 0; i < num_nodes; i++) order[i] = (Offer){t->slots[i + 1].value, i, i + 1};
    qsort(order, (size_t)num_nodes, sizeof(Offer), by_value);
    for (int64_t i = 0; i < num_kept; i++) is_kept[order[i].slot] = 1;
    number[0] = -1;
    out->norms[0] = t->slots[0].urn.norm;
    int64_t num_open = 0, written = 0;
    open[num_open++] = 0;
    while (num_open) {
        const int64_t slot = open[--num_open];
        const GrowingSlot *s = t->slots + slot;
        if (slot) {
            number[slot] = written;
            out->tokens[written] = s->token, out->parents[written] = number[s->parent];
            out->places[written] = s->place, out->layers[written] = s->layer, out->columns[written] = s->column;
            out->probs[written] = s->prob, out->values[written] = s->value;
            out->norms[++written] = s->urn.norm;
        }
        for (int64_t child = s->last_child; child; child = t->slots[child].elder)
            if (is_kept[child]) open[num_open++] = child; /* the first child lies on top */
    }
    free(order);
    return written;
}
