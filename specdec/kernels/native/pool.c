/* Worker threads for work of a few microseconds.
 *
 * A job is a function and a number of chunks. The caller and the workers draw chunks from one counter, so the caller
 * waits only for chunks that a worker has really begun: a worker that the operating system has put aside costs its
 * share, not a stall. One that is put aside in the middle of a chunk does cost a stall. Where stalls take much of the
 * time the caller works alone for a while, longer each time: on a busy machine two threads are slower than one. Where
 * they are rare (other libraries' workers spin for a moment on their cores), they are put up with.
 * Workers spin between jobs (a forward has hundreds of them, microseconds apart) and go to sleep after SPIN_NS without
 * one. After a fork the child starts workers of its own. */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "common.h"

#define MAX_THREADS 64
#define CHUNK_BITS 20
#define MAX_CHUNKS ((1 << CHUNK_BITS) - 1)
#define SPIN_NS 300000
#define STALL_NS 150000          /* waiting longer than this (and than a few chunks take) is a stall */
#define RARE 8                   /* a stall is rare after that many times its length without one */
#define MIN_ALONE_NS 5000000ll   /* how long to work alone after one that is not: doubled by each, */
#define MAX_ALONE_NS 320000000ll /* halved by each that is */

static struct {
    /* job number (24 bits), chunks in the job (20), next chunk to draw (20): one word, so a draw is one exchange */
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) _Atomic int num_done;
    _Alignas(64) chunk_fn fn;
    void *context;
    _Atomic int num_active, num_sleeping; /* threads allowed to work, the caller included; workers asleep */
    int num_workers;
    int64_t alone_ns, alone_until; /* set by stalls */
    int64_t together_ns;           /* of jobs since the last stall; what lies between jobs says nothing */
    pthread_mutex_t sleep_lock;
    pthread_cond_t wake;
} pool = {.num_active = 1, .sleep_lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

/* One forward at a time: the pool and the scratch memory are shared by the process. */
static pthread_mutex_t call_lock = PTHREAD_MUTEX_INITIALIZER;

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static int next_chunk(uint64_t ticket) { return (int)(ticket & MAX_CHUNKS); }
static int is_open(uint64_t ticket) { return next_chunk(ticket) < (int)(ticket >> CHUNK_BITS & MAX_CHUNKS); }
static uint64_t job_of(uint64_t ticket) { return ticket >> 2 * CHUNK_BITS; }

static int run_one_chunk(void) {
    uint64_t ticket = atomic_load(&pool.ticket);
    while (is_open(ticket))
        if (atomic_compare_exchange_weak(&pool.ticket, &ticket, ticket + 1)) {
            pool.fn(pool.context, next_chunk(ticket));
            atomic_fetch_add(&pool.num_done, 1);
            return 1;
        }
    return 0;
}

static int has_work(int id) { return id < atomic_load(&pool.num_active) && is_open(atomic_load(&pool.ticket)); }

static void sleep_until_next_job(int id) {
    pthread_mutex_lock(&pool.sleep_lock);
    atomic_fetch_add(&pool.num_sleeping, 1);
    const uint64_t last_job = job_of(atomic_load(&pool.ticket));
    while (!has_work(id) && (job_of(atomic_load(&pool.ticket)) == last_job || id >= atomic_load(&pool.num_active)))
        pthread_cond_wait(&pool.wake, &pool.sleep_lock);
    atomic_fetch_sub(&pool.num_sleeping, 1);
    pthread_mutex_unlock(&pool.sleep_lock);
}

static void *worker(void *argument) {
    const int id = (int)(intptr_t)argument;
    int64_t idle_since = now_ns();
    for (unsigned turn = 1;; turn++) {
        if (has_work(id) && run_one_chunk()) {
            idle_since = now_ns();
        } else if (turn % 64 || now_ns() - idle_since < SPIN_NS) {
            pause_spinning();
        } else {
            sleep_until_next_job(id);
            idle_since = now_ns();
        }
    }
    return NULL;
}

static void forget_workers(void) {
    pool.num_workers = 0;
    pool.num_sleeping = 0;
    pool.ticket = 0;
    pthread_mutex_init(&pool.sleep_lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_mutex_init(&call_lock, NULL);
}

/* How many requests for memory are granted before one is refused, for tests; negative: all are. */
static _Atomic int64_t requests_left = -1;

void fail_allocation_after(int64_t count) { atomic_store(&requests_left, count); }

static int is_refused(void) {
    return atomic_load_explicit(&requests_left, memory_order_relaxed) >= 0 && atomic_fetch_sub(&requests_left, 1) == 0;
}

/* What the running call took beyond the scratch memory that was there; 64 bytes before the memory itself. */
typedef struct Extra {
    _Alignas(64) struct Extra *next;
} Extra;

/* Scratch memory of the running call: released as a whole when the next call begins. */
static struct {
    char *memory;
    size_t size, used, wanted;
    Extra *extra;
} scratch;

jmp_buf memory_ran_out;

static void release_extra(void) {
    for (Extra *next; scratch.extra; scratch.extra = next) next = scratch.extra->next, free(scratch.extra);
}

/* Ends the running call. The next one begins with the memory of the last that went well. */
static _Noreturn void give_up(void) {
    release_extra();
    scratch.wanted = 0;
    _longjmp(memory_ran_out, 1);
}

void *take(size_t bytes) {
    if (bytes > SIZE_MAX / 4 || is_refused()) give_up();
    bytes = (bytes + 127) & ~(size_t)63;
    scratch.wanted += bytes;
    if (scratch.used + bytes <= scratch.size) {
        scratch.used += bytes;
        return scratch.memory + scratch.used - bytes;
    }
    Extra *extra = aligned_alloc(64, sizeof(Extra) + bytes);
    if (!extra) give_up();
    extra->next = scratch.extra, scratch.extra = extra;
    return extra + 1;
}

static void reset_scratch(void) {
    release_extra();
    if (scratch.wanted > scratch.size) {
        free(scratch.memory);
        scratch.size = scratch.wanted + scratch.wanted / 4;
        scratch.size = (scratch.size + 63) & ~(size_t)63;
        scratch.memory = aligned_alloc(64, scratch.size);
        if (!scratch.memory) scratch.size = 0;
    }
    scratch.used = scratch.wanted = 0;
}

void begin_call(int num_threads) {
    pthread_mutex_lock(&call_lock);
    reset_scratch();
    num_threads = num_threads < 1 ? 1 : num_threads > MAX_THREADS ? MAX_THREADS : num_threads;
    while (pool.num_workers < num_threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)(pool.num_workers + 1))) break;
        pthread_detach(thread);
        if (pool.num_workers++ == 0) pthread_atfork(NULL, NULL, forget_workers);
    }
    atomic_store(&pool.num_active, num_threads);
}

int num_active_threads(void) { return atomic_load(&pool.num_active); }

void end_call(void) { pthread_mutex_unlock(&call_lock); }

/* Waits for the workers' last chunks. `patience_ns`: a wait beyond this is a stall. */
static void wait_for_workers(int num_chunks, int64_t patience_ns) {
    const int64_t start = now_ns();
    int stalled = 0;
    for (unsigned turn = 1; atomic_load(&pool.num_done) < num_chunks; turn++) {
        if (stalled)
            sched_yield();
        else
            pause_spinning();
        if (turn % 64 == 0) stalled = now_ns() - start > patience_ns;
    }
    if (!stalled) return;
    const int64_t now = now_ns();
    if (pool.together_ns >= RARE * (now - start)) {
        pool.alone_ns /= 2;
    } else {
        pool.alone_ns = pool.alone_ns * 2 < MIN_ALONE_NS ? MIN_ALONE_NS : pool.alone_ns * 2;
        if (pool.alone_ns > MAX_ALONE_NS) pool.alone_ns = MAX_ALONE_NS;
        pool.alone_until = now + pool.alone_ns;
    }
    pool.together_ns = 0;
}

void parallel_for(chunk_fn fn, void *context, int num_chunks) {
    const int64_t start = now_ns();
    if (num_chunks == 1 || num_chunks > MAX_CHUNKS || pool.num_active == 1 || start < pool.alone_until) {
        for (int chunk = 0; chunk < num_chunks; chunk++) fn(context, chunk);
        return;
    }
    pool.fn = fn;
    pool.context = context;
    atomic_store(&pool.num_done, 0);
    const uint64_t job = job_of(atomic_load(&pool.ticket)) + 1;
    atomic_store(&pool.ticket, job << 2 * CHUNK_BITS | (uint64_t)num_chunks << CHUNK_BITS);
    if (atomic_load(&pool.num_sleeping) > pool.num_workers - (pool.num_active - 1)) {
        pthread_mutex_lock(&pool.sleep_lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.sleep_lock);
    }
    int mine = 0;
    while (run_one_chunk()) mine++;
    if (atomic_load(&pool.num_done) < num_chunks) {
        const int64_t ready = now_ns(), chunk_ns = mine ? (ready - start) / mine : STALL_NS;
        pool.together_ns += ready - start;
        wait_for_workers(num_chunks, STALL_NS + 4 * chunk_ns);
    } else {
        pool.together_ns += now_ns() - start;
    }
}
