/* LD_PRELOAD: adds to the system clock the seconds that stand in the file $CLOCK_OFFSET. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *time) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(clock, time);
    const char *path = getenv("CLOCK_OFFSET");
    if (clock != CLOCK_REALTIME || status || !path) return status;
    FILE *file = fopen(path, "r");
    long offset = 0;
    if (file) {
        if (fscanf(file, "%ld", &offset) != 1) offset = 0;
        fclose(file);
    }
    time->tv_sec += offset;
    return status;
}
