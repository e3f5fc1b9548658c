/* A disk that can be made to fail. Preloaded into a process (LD_PRELOAD), it counts the calls that change one folder or files below
 * it and, once `disk_arm` was called, ends the process at call number n (a write is then half done), or lets calls fail from one
 * number to another with an error, and writes down every call: its kind and paths, one a line. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static char folder[4096];
static long count, kill_at, fail_from, fail_to;
static int failure, no_exchange, record = -1;

void disk_arm(const char *below, long kill_number, long from, long to, int error, int without_exchange, const char *log) {
    snprintf(folder, sizeof folder, "%s", below);
    count = 0;
    kill_at = kill_number, fail_from = from, fail_to = to, failure = error, no_exchange = without_exchange;
    record = log ? syscall(SYS_openat, AT_FDCWD, log, O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0644) : -1;
}

long disk_count(void) { return count; }

static void path_of(int fd, char *out, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, out, size - 1);
    out[length > 0 ? length : 0] = 0;
}

static void path_at(int at, const char *name, char *out, size_t size) {
    if (name[0] == '/' || at == AT_FDCWD) {
        snprintf(out, size, "%s", name);
        return;
    }
    path_of(at, out, size);
    size_t length = strlen(out);
    snprintf(out + length, size - length, "/%s", name);
}

/* What becomes of a call: 0 it goes on, -1 it fails with errno, 1 the process is to end. */
static int gate(const char *kind, const char *path, const char *other) {
    size_t length = strlen(folder);
    if (!length || strncmp(path, folder, length) || (path[length] && path[length] != '/')) return 0;
    count++;
    if (record >= 0) {
        char line[9000];
        int size = snprintf(line, sizeof line, "%s\t%s\t%s\n", kind, path, other);
        syscall(SYS_write, record, line, size);
    }
    if (count == kill_at) return 1;
    if (count >= fail_from && count <= fail_to) {
        errno = failure;
        return -1;
    }
    return 0;
}

static void end(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static int stops(const char *kind, const char *path, const char *other) {
    int verdict = gate(kind, path, other);
    if (verdict > 0) end();
    return verdict < 0;
}

#define NEXT(name) __typeof__(name) *next = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define OPEN(name)                                                                      \
    int name(const char *path, int flags, ...) {                                        \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        NEXT(name);                                   \
        if ((flags & O_ACCMODE) != O_RDONLY && stops("open", path, "")) return -1;      \
        return next(path, flags, mode);                                                 \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                    \
    int name(int at, const char *path, int flags, ...) {                                \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        NEXT(name);                              \
        char full[8192]; path_at(at, path, full, sizeof full);                          \
        if ((flags & O_ACCMODE) != O_RDONLY && stops("open", full, "")) return -1;      \
        return next(at, path, flags, mode);                                             \
    }
OPENAT(openat)
OPENAT(openat64)

#define HALF(kind, fd, call, half)                                                      \
    do {                                                                                \
        char path[8192]; path_of(fd, path, sizeof path);                                \
        int verdict = gate(kind, path, "");                                             \
        if (verdict < 0) return -1;                                                     \
        if (verdict > 0) { half; end(); }                                               \
        return call;                                                                    \
    } while (0)

ssize_t write(int fd, const void *data, size_t size) {
    NEXT(write);
    HALF("write", fd, next(fd, data, size), (void)!next(fd, data, size / 2));
}
#define PWRITE(name)                                                                    \
    ssize_t name(int fd, const void *data, size_t size, off_t at) {                     \
        NEXT(name);                     \
        HALF("write", fd, next(fd, data, size, at), (void)!next(fd, data, size / 2, at)); \
    }
PWRITE(pwrite)
PWRITE(pwrite64)
#define SENDFILE(name)                                                                  \
    ssize_t name(int out, int in, off_t *at, size_t size) {                             \
        NEXT(name);                            \
        HALF("write", out, next(out, in, at, size), (void)!next(out, in, at, 1));       \
    }
SENDFILE(sendfile)
SENDFILE(sendfile64)

#define ON_FD(name, kind)                                                               \
    int name(int fd) {                                                                  \
        NEXT(name);                                                      \
        char path[8192]; path_of(fd, path, sizeof path);                                \
        return stops(kind, path, "") ? -1 : next(fd);                                   \
    }
ON_FD(fsync, "fsync")
ON_FD(fdatasync, "fsync")

#define ALLOCATE(name)                                                                  \
    int name(int fd, off_t at, off_t size) {                                            \
        NEXT(name);                                        \
        char path[8192]; path_of(fd, path, sizeof path);                                \
        return stops("allocate", path, "") ? errno : next(fd, at, size);                \
    }
ALLOCATE(posix_fallocate)
ALLOCATE(posix_fallocate64)

#define ON_PATH(name, kind, parameters, arguments)                                      \
    int name parameters {                                                               \
        NEXT(name);                                                \
        return stops(kind, path, "") ? -1 : next arguments;                             \
    }
ON_PATH(mkdir, "mkdir", (const char *path, mode_t mode), (path, mode))
ON_PATH(unlink, "unlink", (const char *path), (path))
ON_PATH(rmdir, "unlink", (const char *path), (path))
ON_PATH(truncate64, "write", (const char *path, off_t size), (path, size))

int unlinkat(int at, const char *path, int flags) {
    NEXT(unlinkat);
    char full[8192];
    path_at(at, path, full, sizeof full);
    return stops("unlink", full, "") ? -1 : next(at, path, flags);
}

int rename(const char *from, const char *to) {
    NEXT(rename);
    return stops("rename", from, to) ? -1 : next(from, to);
}

int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
    NEXT(renameat2);
    if (no_exchange) {
        errno = EINVAL;
        return -1;
    }
    return stops("exchange", from, to) ? -1 : next(from_at, from, to_at, to, flags);
}
