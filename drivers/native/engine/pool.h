// Threads that wait for a step and run it together, meeting at barriers.
//
// At a barrier and between steps a thread spins for a moment, for a phase lasts microseconds, and then sleeps.
// So an idle engine takes no processor time; and where other programs want the cores too, the core of the
// thread that sleeps is free for the one that everybody waits for.
#pragma once
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

#include "kernels.h"

// How long a thread spins for the next step before it sleeps: as long as a busy kernel takes to send it, for waking up takes
// 100 µs.
static constexpr int64_t IDLE_NS = 400000;

// How long it spins at a barrier. Others are behind by microseconds, and where they lost their cores by what it takes to get
// them back; to sleep and be woken takes 100 µs on a virtual machine.
static constexpr int64_t BARRIER_NS = 200000;

static inline int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

struct llk_pool {
    int threads = 1;
    int *cpus = nullptr;  // one for each thread; NULL: they run anywhere
    pthread_t *handles = nullptr;
    void (*work)(void *, int) = nullptr;
    void *argument = nullptr;
    alignas(64) std::atomic<uint32_t> job{0};
    alignas(64) std::atomic<int32_t> arrived{0};
    alignas(64) std::atomic<uint32_t> round{0};
    alignas(64) std::atomic<uint32_t> idle{0};  // threads that sleep, waiting for a job
    std::atomic<uint32_t> at_barrier{0};        // … or for the others
    std::atomic<bool> ending{false};

    // Waits until `word` is not `old`. `sleepers` tells `wake` whether anybody has to be woken.
    static void wait(std::atomic<uint32_t> &word, uint32_t old, std::atomic<uint32_t> &sleepers, int64_t patience) {
        int64_t end = 0;
        for (uint32_t spins = 1; word.load(std::memory_order_acquire) == old; spins++) {
            relax();
            if (spins % 64) continue;
            const int64_t now = now_ns();
            if (!end) end = now + patience;
            if (now < end) continue;
            sleepers.fetch_add(1, std::memory_order_seq_cst);
            if (word.load(std::memory_order_seq_cst) == old) syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, old, 0, 0, 0);
            sleepers.fetch_sub(1, std::memory_order_seq_cst);
        }
    }

    void wake(std::atomic<uint32_t> &word, std::atomic<uint32_t> &sleepers) {
        word.fetch_add(1, std::memory_order_seq_cst);
        if (sleepers.load(std::memory_order_seq_cst)) syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, threads, 0, 0, 0);
    }

    void barrier() {
        if (threads == 1) return;
        const uint32_t now = round.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) != threads - 1) return wait(round, now, at_barrier, BARRIER_NS);
        arrived.store(0, std::memory_order_relaxed);
        wake(round, at_barrier);
    }

    // Keeps the calling thread on one processor. Linux wakes a thread where it was or where its waker is; threads that meet
    // every few microseconds can stay on one core for long, taking turns, while another is idle.
    void pin(int thread) {
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(cpus[thread], &one);
        sched_setaffinity(0, sizeof one, &one);
    }

    // Runs work(argument, thread) on every thread, the caller being thread 0, and waits for all.
    void run(void (*what)(void *, int), void *with) {
        work = what;
        argument = with;
        cpu_set_t before;  // torch, in the same process, gives its threads what the caller has
        const bool pinned = cpus && !sched_getaffinity(0, sizeof before, &before);
        if (pinned) pin(0);
        if (threads > 1) wake(job, idle);
        what(with, 0);
        barrier();
        if (pinned) sched_setaffinity(0, sizeof before, &before);
    }

    void serve(int thread) {
        if (cpus) pin(thread);
        for (uint32_t seen = 0;; seen++) {
            wait(job, seen, idle, IDLE_NS);
            if (ending.load(std::memory_order_acquire)) return;
            work(argument, thread);
            barrier();
        }
    }
};

struct PoolThread {
    llk_pool *pool;
    int thread;
};

static void *serve_pool(void *argument) {
    PoolThread start = *(PoolThread *)argument;
    free(argument);
    start.pool->serve(start.thread);
    return nullptr;
}

extern "C" void llk_pool_free(llk_pool *pool) {
    if (!pool) return;
    pool->ending.store(true, std::memory_order_release);
    pool->wake(pool->job, pool->idle);
    for (int i = 1; i < pool->threads; i++) pthread_join(pool->handles[i], nullptr);
    free(pool->handles);
    free(pool->cpus);
    pool->~llk_pool();
    free(pool);
}

extern "C" llk_pool *llk_pool_new(int32_t threads, const int32_t *cpus) {
    void *memory = nullptr;
    if (threads < 1 || !tiles_usable() || posix_memalign(&memory, 64, sizeof(llk_pool))) return nullptr;
    llk_pool *pool = new (memory) llk_pool;
    pool->handles = (pthread_t *)calloc((size_t)threads, sizeof(pthread_t));
    // One thread alone may as well run where the others of the machine leave room.
    if (cpus && threads > 1) {
        pool->cpus = (int *)malloc((size_t)threads * sizeof(int));
        for (int i = 0; i < threads && pool->cpus; i++) pool->cpus[i] = cpus[i];
    }
    for (int i = 1; i < threads && pool->handles; i++) {
        PoolThread *start = (PoolThread *)malloc(sizeof(PoolThread));
        if (start) *start = {pool, i};
        if (!start || pthread_create(&pool->handles[i], nullptr, serve_pool, start)) {
            free(start);
            llk_pool_free(pool);  // ends those that have been started
            return nullptr;
        }
        pool->threads = i + 1;
    }
    if (!pool->handles) {
        llk_pool_free(pool);
        return nullptr;
    }
    return pool;
}
