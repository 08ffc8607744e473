/* A disk that fails: preloaded, it makes the n-th call of an operation below a folder fail, and every later one.
 *
 *   cc -shared -fPIC -o failing_disk.so failing_disk.c -ldl
 *   LD_PRELOAD=./failing_disk.so python ...    then arm_disk("write", "/folder", 3, ENOSPC, 1) through ctypes
 *
 * Operations: write, fsync, rename, read. With `half` the n-th write first writes half of its bytes, as a disk does
 * that is about to be full.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char armed_operation[16], armed_folder[PATH_MAX];
static int armed_call, armed_error, armed_half;
static atomic_int calls;

void arm_disk(const char *operation, const char *folder, int call, int error, int half) {
    snprintf(armed_operation, sizeof armed_operation, "%s", operation);
    snprintf(armed_folder, sizeof armed_folder, "%s", folder);
    armed_call = call, armed_error = error, armed_half = half;
    atomic_store(&calls, 0);
}

int disk_calls(void) { return atomic_load(&calls); }

/* 0: not this call; 1: the first that fails; 2: a later one. */
static int fails(const char *operation, const char *path) {
    if (strcmp(operation, armed_operation) || strncmp(path, armed_folder, strlen(armed_folder))) return 0;
    int call = atomic_fetch_add(&calls, 1) + 1;
    return call < armed_call ? 0 : call == armed_call ? 1 : 2;
}

static int fails_on(const char *operation, int file) {
    char link[64], path[PATH_MAX];
    if (!armed_operation[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(operation, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int file, const void *bytes, size_t count) {
    int how = fails_on("write", file);
    if (how == 1 && armed_half && count > 1) return REAL(write)(file, bytes, count / 2);
    if (how) return errno = armed_error, -1;
    return REAL(write)(file, bytes, count);
}

ssize_t read(int file, void *bytes, size_t count) {
    if (fails_on("read", file)) return errno = armed_error, -1;
    return REAL(read)(file, bytes, count);
}

int fsync(int file) {
    if (fails_on("fsync", file)) return errno = armed_error, -1;
    return REAL(fsync)(file);
}

int rename(const char *from, const char *to) {
    if (fails("rename", to)) return errno = armed_error, -1;
    return REAL(rename)(from, to);
}
