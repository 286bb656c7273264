/* Worker threads for work of a few microseconds.
 *
 * A job is a function and a number of chunks. Each thread has a range of them, one after the other in memory: what it
 * asks for ahead of use is its own. Whoever has done its range draws from the others', so the caller waits only for
 * chunks that a worker has really begun: a worker that the operating system has put aside costs its share, not a stall.
 * One that is put aside in the middle of a chunk does cost a stall.
 * Where other programs want the cores, several threads are slower than one: the system gives them the time of one, and
 * some of it is spent waiting. So it is measured what is lost to others: what the caller waits for a worker, what a worker
 * that waits for work finds missing between two looks at the clock, and what the caller's clock of processor time lacks.
 * Where that is much, half of the threads do the work for a while, at last the caller alone, and the others sleep. They
 * come back when the while is over, unless the caller itself is still put aside: then no core is free. It begins alone.
 * What is lost rarely (other libraries' workers spin for a moment on their cores) is put up with.
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
#define GAP_NS 50000             /* more than this between two looks at the clock: a worker was put aside */
#define LEAST_WAITED_NS 1000000  /* nothing is concluded from less */
#define LEAST_SAMPLED_NS 5000000 /* nor of the caller from less of its work: time slices are about as long */
#define SAMPLE_NS 500000         /* between looks at the clock of processor time, which costs ten of the other's */
#define PROOF_NS 100000000       /* of work: a number of threads has stood the test */
#define MIN_HOLD_NS 20000000     /* for how long fewer threads work: so long, twice as long each time, */
#define MAX_HOLD_NS 1000000000
#define HOLD_PER_LOST 32 /* and at least so many times what was lost before: trying costs three in a hundred */

/* What is left of a thread's range of a job: job number (24 bits), end of the range (20), next chunk to draw (20). One
 * word, so a draw is one exchange. */
typedef struct {
    _Alignas(64) _Atomic uint64_t ticket;
} Range;

static struct {
    Range ranges[MAX_THREADS];
    _Alignas(64) _Atomic int num_done;
    _Alignas(64) chunk_fn fn;
    void *context;
    _Atomic uint64_t job;
    _Atomic int num_active, num_sleeping; /* threads that may work, the caller included; workers asleep */
    int num_workers;
    pthread_mutex_t sleep_lock;
    pthread_cond_t wake;
} pool = {.num_active = 1, .sleep_lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

/* How many threads the machine has cores for, as far as is known. Counts begin anew with each conclusion. */
static struct {
    int limit, num_wanted;          /* of threads; how many the running call asks for */
    int is_ignored;                 /* for tests */
    int64_t hold_ns, hold_until;
    int64_t call_start, call_cpu;   /* by both clocks; -1 where the running call is no sample */
    int64_t worked_ns;              /* in calls */
    int64_t sampled_ns, away_ns;    /* in calls that are samples; of it, the caller was put aside */
    int64_t next_sample;
    _Atomic int64_t waited_ns;      /* by the caller for workers, by workers for a core */
} share = {.limit = 1, .hold_ns = MIN_HOLD_NS};

/* One forward at a time: the pool and the scratch memory are shared by the process. */
static pthread_mutex_t call_lock = PTHREAD_MUTEX_INITIALIZER;

static int64_t clock_ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static int64_t now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }

static int next_chunk(uint64_t ticket) { return (int)(ticket & MAX_CHUNKS); }
static int is_open(uint64_t ticket) { return next_chunk(ticket) < (int)(ticket >> CHUNK_BITS & MAX_CHUNKS); }

/* The caller is thread 0. A thread that may not work on a job finds that its tickets have changed. */
static int run_one_chunk(int id) {
    const int num_active = atomic_load(&pool.num_active);
    for (int i = 0, of = id; i < num_active; i++, of = of + 1 < num_active ? of + 1 : 0) {
        uint64_t ticket = atomic_load(&pool.ranges[of].ticket);
        while (is_open(ticket) && id < atomic_load(&pool.num_active))
            if (atomic_compare_exchange_weak(&pool.ranges[of].ticket, &ticket, ticket + 1)) {
                pool.fn(pool.context, next_chunk(ticket));
                atomic_fetch_add(&pool.num_done, 1);
                return 1;
            }
    }
    return 0;
}

static void sleep_until_next_job(int id) {
    pthread_mutex_lock(&pool.sleep_lock);
    atomic_fetch_add(&pool.num_sleeping, 1);
    const uint64_t last_job = atomic_load(&pool.job);
    while (atomic_load(&pool.job) == last_job || id >= atomic_load(&pool.num_active))
        pthread_cond_wait(&pool.wake, &pool.sleep_lock);
    atomic_fetch_sub(&pool.num_sleeping, 1);
    pthread_mutex_unlock(&pool.sleep_lock);
}

static void *worker(void *argument) {
    const int id = (int)(intptr_t)argument;
    int64_t idle_since = now_ns(), last_look = idle_since;
    for (unsigned turn = 1;; turn++) {
        if (run_one_chunk(id)) {
            idle_since = last_look = now_ns();
        } else if (turn % 64) {
            pause_spinning();
        } else {
            const int64_t now = now_ns(), gap = now - last_look, others = atomic_load(&pool.num_active) - 1;
            if (gap > GAP_NS && others > 0) atomic_fetch_add(&share.waited_ns, gap / others);
            last_look = now;
            if (now - idle_since > SPIN_NS) {
                sleep_until_next_job(id);
                idle_since = last_look = now_ns();
            }
        }
    }
    return NULL;
}

static void forget_workers(void) {
    pool.num_workers = 0;
    pool.num_sleeping = 0;
    memset(pool.ranges, 0, sizeof pool.ranges);
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
    const int is_free = share.is_ignored || num_threads <= share.limit;
    atomic_store(&pool.num_active, is_free ? num_threads : share.limit);
    share.num_wanted = num_threads;
    if (num_threads == 1) return;
    share.call_start = now_ns();
    share.call_cpu = share.call_start < share.next_sample ? -1 : clock_ns(CLOCK_THREAD_CPUTIME_ID);
}

int num_active_threads(void) { return atomic_load(&pool.num_active); }

void use_all_threads(int is_on) { share.is_ignored = is_on; }

static void begin_count(void) {
    share.worked_ns = share.sampled_ns = share.away_ns = 0;
    atomic_store(&share.waited_ns, 0);
}

static void use_fewer_threads(int64_t now, int64_t lost) {
    const int64_t least = HOLD_PER_LOST * lost;
    share.limit = num_active_threads() / 2;
    share.hold_until = now + (share.hold_ns > least ? share.hold_ns : least);
    share.hold_ns = share.hold_ns * 2 < MAX_HOLD_NS ? share.hold_ns * 2 : MAX_HOLD_NS;
    begin_count();
}

/* At the end of a call that wants several threads. */
static void adjust_limit(void) {
    const int64_t now = now_ns(), worked = now - share.call_start;
    share.worked_ns += worked;
    if (share.call_cpu >= 0) {
        const int64_t away = worked - (clock_ns(CLOCK_THREAD_CPUTIME_ID) - share.call_cpu);
        share.sampled_ns += worked;
        share.away_ns += away > 0 ? away : 0;
        share.next_sample = now + SAMPLE_NS;
    }
    const int64_t waited = atomic_load(&share.waited_ns), is_known = share.sampled_ns > LEAST_SAMPLED_NS;
    const int is_alone = num_active_threads() == 1;
    if (!is_alone && waited > LEAST_WAITED_NS && 3 * waited > share.worked_ns) {
        use_fewer_threads(now, waited);
    } else if (!is_alone && is_known && 3 * share.away_ns > share.sampled_ns) {
        use_fewer_threads(now, share.away_ns);
    } else if (share.limit < share.num_wanted && now > share.hold_until && is_known) {
        if (8 * share.away_ns < share.sampled_ns)
            share.limit *= 2;
        else
            share.hold_until = now + share.hold_ns;
        begin_count();
    } else if (share.worked_ns > PROOF_NS) {
        if (!is_alone) share.hold_ns = MIN_HOLD_NS;
        begin_count();
    }
}

void end_call(void) {
    if (share.num_wanted > 1) adjust_limit();
    pthread_mutex_unlock(&call_lock);
}

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
    if (stalled) atomic_fetch_add(&share.waited_ns, now_ns() - start);
}

void parallel_for(chunk_fn fn, void *context, int num_chunks) {
    if (num_chunks == 1 || num_chunks > MAX_CHUNKS || pool.num_active == 1) {
        for (int chunk = 0; chunk < num_chunks; chunk++) fn(context, chunk);
        return;
    }
    const int64_t start = now_ns();
    pool.fn = fn;
    pool.context = context;
    atomic_store(&pool.num_done, 0);
    const uint64_t job = atomic_load(&pool.job) + 1, num_active = (uint64_t)pool.num_active;
    for (uint64_t i = 0; i < num_active; i++) {
        const uint64_t first = num_chunks * i / num_active, end = num_chunks * (i + 1) / num_active;
        atomic_store(&pool.ranges[i].ticket, job << 2 * CHUNK_BITS | end << CHUNK_BITS | first);
    }
    atomic_store(&pool.job, job);
    if (atomic_load(&pool.num_sleeping) > pool.num_workers - (pool.num_active - 1)) {
        pthread_mutex_lock(&pool.sleep_lock);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.sleep_lock);
    }
    int mine = 0;
    while (run_one_chunk(0)) mine++;
    if (atomic_load(&pool.num_done) < num_chunks)
        wait_for_workers(num_chunks, STALL_NS + 4 * (mine ? (now_ns() - start) / mine : STALL_NS));
}
