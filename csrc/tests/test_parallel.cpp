// The loop over threads, also where the system has fewer of them than it is asked for.
#include <atomic>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "parallel.hpp"

#ifdef __linux__
#include <dlfcn.h>
#include <pthread.h>

#include <cerrno>
#endif

namespace parallel_test {

#ifdef __linux__
std::atomic<int> threads_left{1 << 30};

// Stands before the C library's.
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*),
                              void* argument) noexcept {
    if (threads_left-- <= 0) return EAGAIN;
    static const auto create =
        reinterpret_cast<decltype(&pthread_create)>(dlsym(RTLD_NEXT, "pthread_create"));
    return create(thread, attributes, start, argument);
}
#endif

void every_index_once(int threads) {
    std::vector<int> times(1000);
    std::atomic<bool> in_range{true};
    usf::parallel_for(static_cast<std::int64_t>(times.size()), threads, [&](int worker, std::int64_t i) {
        if (worker < 0 || worker >= usf::workers_for(1000, threads)) in_range = false;
        ++times[i];
    });
    CHECK(times == std::vector<int>(1000, 1));
    CHECK(in_range);
}

void too_few_threads() {
#ifdef __linux__
    for (const int left : {0, 2}) {
        threads_left = left;
        every_index_once(8);
        CHECK(threads_left < 0);
    }
    threads_left = 1 << 30;
#endif
}

void failures_come_back() {
    try {
        usf::parallel_for(100, 4, [](int, std::int64_t i) {
            if (i == 50) throw std::runtime_error("50");
        });
        CHECK(false);
    } catch (const std::runtime_error&) {
    }
}

}  // namespace parallel_test

int test_parallel(int, char*[]) {
    using namespace parallel_test;
    for (const int threads : {-1, 0, 1, 3, 2000}) every_index_once(threads);
    too_few_threads();
    failures_come_back();
    CHECK(usf::workers_for(0, 8) == 1);
    return failures != 0;
}
