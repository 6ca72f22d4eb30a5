/* A wall clock that can be set while programs run, for one host of the rig: preloaded into its processes.
 *
 * The file that FAKE_CLOCK names holds a signed 64-bit number of nanoseconds, which is added to CLOCK_REALTIME from the
 * moment it is written. The monotonic clocks and the times of files stay as they are. An absolute time that is waited
 * for on the wall clock is turned back into a real one. (libfaketime 0.9.10 breaks Python's time.sleep when it leaves
 * the monotonic clock alone.)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL
#define NOT_UPTIME 1000000000LL /* a monotonic time is no 30 years */

static volatile int64_t *offset;

__attribute__((constructor)) static void open_offset(void) {
    const char *path = getenv("FAKE_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *place = mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (place != MAP_FAILED) offset = place;
}

static void shift(struct timespec *time, int64_t by) {
    int64_t whole = (int64_t)time->tv_sec * SECOND + time->tv_nsec + by;
    time->tv_sec = whole / SECOND;
    time->tv_nsec = whole % SECOND;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, time);
    if (!result && offset && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) shift(time, *offset);
    return result;
}

int gettimeofday(struct timeval *restrict value, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    value->tv_sec = now.tv_sec;
    value->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *place) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (place) *place = now.tv_sec;
    return now.tv_sec;
}

static const struct timespec *real_time(const struct timespec *until, struct timespec *copy) {
    *copy = *until;
    if (offset && until->tv_sec > NOT_UPTIME) shift(copy, -*offset);
    return copy;
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    struct timespec copy;
    /* without the version an older, incompatible one would be found */
    if (!real) *(void **)&real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    return real(condition, mutex, real_time(until, &copy));
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    static int (*real)(sem_t *, const struct timespec *);
    struct timespec copy;
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "sem_timedwait");
    return real(semaphore, real_time(until, &copy));
}
