/* LD_PRELOAD: die, or run out of space, at a chosen file operation below one folder.
 *
 *   killfs_arm(n, folder)    SIGKILL this process at its n-th changing operation (0: only count)
 *   killfs_victim(pid)       let another process die instead of this one
 *   killfs_fill(n, folder)   from the n-th write on, answer "no space left on device"
 *   killfs_drain(n)          only n writes are answered so; then there is space again
 *   killfs_count()           changing operations, or writes, so far
 *
 * A write counts twice: before its first byte, and with half of its bytes written.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[2048];
static long count, kill_at, full_at, full_for, victim;

void killfs_arm(long n, const char *path) {
    snprintf(folder, sizeof folder, "%s/", path);
    count = 0, kill_at = n, full_at = full_for = victim = 0;
}

void killfs_victim(long pid) { victim = pid; }

void killfs_fill(long n, const char *path) {
    killfs_arm(0, path);
    full_at = n;
}

void killfs_drain(long n) { full_for = n; }

long killfs_count(void) { return count; }

static int inside(const char *path) { return strncmp(path, folder, strlen(folder)) == 0; }

/* Whether `path`, relative to the open folder `at`, is below the watched one. */
static int watched(int at, const char *path) {
    char base[2048], whole[4200], link[64];
    if (!folder[0] || !path) return 0;
    if (path[0] == '/') return inside(path);
    if (at == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length <= 0) return 0;
        base[length] = 0;
    }
    snprintf(whole, sizeof whole, "%s/%s", base, path);
    return inside(whole);
}

static int watched_file(int file) { return file > 2 && watched(file, ""); }

static void operation(void) {
    if (full_at) return;
    if (++count == kill_at) kill(victim ? victim : getpid(), SIGKILL);
}

static int full(void) {
    if (!full_at || ++count < full_at) return 0;
    return !full_for || count < full_at + full_for;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* A write of `size` bytes; `half` does the first half of it. Returns 1 if the disk is full. */
#define WRITING(file, half)                                       \
    if (watched_file(file)) {                                     \
        if (full()) {                                             \
            errno = ENOSPC;                                       \
            return -1;                                            \
        }                                                         \
        if (!full_at) {                                           \
            operation();                                          \
            if (count + 1 == kill_at && !victim) { (void)!(half); }          \
            operation();                                          \
        }                                                         \
    }

ssize_t write(int file, const void *data, size_t size) {
    WRITING(file, REAL(write)(file, data, size / 2));
    return REAL(write)(file, data, size);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) {
    WRITING(file, REAL(pwrite64)(file, data, size / 2, offset));
    return REAL(pwrite64)(file, data, size, offset);
}

ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) {
    off64_t here = offset ? *offset : 0;
    WRITING(out, REAL(sendfile64)(out, in, offset ? &here : NULL, size / 2));
    return REAL(sendfile64)(out, in, offset, size);
}

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    WRITING(out, REAL(copy_file_range)(in, from, out, to, size / 2, flags));
    return REAL(copy_file_range)(in, from, out, to, size, flags);
}

#define CHANGING(at, path) \
    if (watched(at, path)) operation()

int rename(const char *from, const char *to) {
    CHANGING(AT_FDCWD, to);
    return REAL(rename)(from, to);
}

int renameat(int from_at, const char *from, int to_at, const char *to) {
    CHANGING(to_at, to);
    return REAL(renameat)(from_at, from, to_at, to);
}

int link(const char *from, const char *to) {
    CHANGING(AT_FDCWD, to);
    return REAL(link)(from, to);
}

int linkat(int from_at, const char *from, int to_at, const char *to, int flags) {
    CHANGING(to_at, to);
    return REAL(linkat)(from_at, from, to_at, to, flags);
}

int unlink(const char *path) {
    CHANGING(AT_FDCWD, path);
    return REAL(unlink)(path);
}

int unlinkat(int at, const char *path, int flags) {
    CHANGING(at, path);
    return REAL(unlinkat)(at, path, flags);
}

int rmdir(const char *path) {
    CHANGING(AT_FDCWD, path);
    return REAL(rmdir)(path);
}

int mkdir(const char *path, mode_t mode) {
    CHANGING(AT_FDCWD, path);
    return REAL(mkdir)(path, mode);
}

int mkdirat(int at, const char *path, mode_t mode) {
    CHANGING(at, path);
    return REAL(mkdirat)(at, path, mode);
}

int ftruncate64(int file, off64_t size) {
    if (watched_file(file)) operation();
    return REAL(ftruncate64)(file, size);
}

int fsync(int file) {
    if (watched_file(file)) operation();
    return REAL(fsync)(file);
}

int fdatasync(int file) {
    if (watched_file(file)) operation();
    return REAL(fdatasync)(file);
}

#define OPENING(at, path, flags)                                       \
    va_list rest;                                                      \
    va_start(rest, flags);                                             \
    mode_t mode = (flags) & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                      \
    if ((flags) & (O_CREAT | O_TRUNC)) CHANGING(at, path)

int open(const char *path, int flags, ...) {
    OPENING(AT_FDCWD, path, flags);
    return REAL(open)(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    OPENING(AT_FDCWD, path, flags);
    return REAL(open64)(path, flags, mode);
}

int openat(int at, const char *path, int flags, ...) {
    OPENING(at, path, flags);
    return REAL(openat)(at, path, flags, mode);
}

int openat64(int at, const char *path, int flags, ...) {
    OPENING(at, path, flags);
    return REAL(openat64)(at, path, flags, mode);
}
