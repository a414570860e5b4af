/* A file system that lies, for LD_PRELOAD: what is below a folder is as on a bad network mount.

   LIE_UNDER   the folder, an absolute path
   LIE_STATE   a folder of the test's, on the same file system: marks that all processes share
   LIE_FAIL    OP:PART:N:ERRNO[:TIMES]; the N-th OP (write, fsync, open, stat, rename) of a process on a
               path that contains PART fails, TIMES times in all (1; 0: always). Each leaves a mark
               `fired.K` that holds the path.
   LIE_FLOCK   errno of every flock
   LIE_LINK    errno of every link
   LIE_OWNER   user id that all files belong to
   LIE_LATE    milliseconds for which other sessions do not see what was renamed: a new name is not
               there, a replaced file is the old one. A session (setsid) stands for a node.
*/
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REAL(name, type, ...)                                        \
    static type (*real_##name)(__VA_ARGS__);                         \
    if (!real_##name) real_##name = dlsym(RTLD_NEXT, #name)
#define PATH (PATH_MAX + 256)

static const char *under, *state;
static char fail_op[16], fail_part[256];
static long fail_at, fail_errno, fail_times, late_ms, flock_errno, link_errno, owner = -1;
static atomic_long seen;

static long number(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atol(text) : otherwise;
}

static int lies(void) {
    static int ready;
    if (!ready && getenv("LIE_UNDER")) { /* set late in a process that was forked */
        under = getenv("LIE_UNDER"), state = getenv("LIE_STATE");
        const char *fail = getenv("LIE_FAIL");
        fail_times = 1;
        if (fail) sscanf(fail, "%15[^:]:%255[^:]:%ld:%ld:%ld", fail_op, fail_part, &fail_at, &fail_errno, &fail_times);
        late_ms = number("LIE_LATE", 0), owner = number("LIE_OWNER", -1);
        flock_errno = number("LIE_FLOCK", 0), link_errno = number("LIE_LINK", 0);
        ready = 1;
    }
    return under && state;
}

/* The absolute path of what a call names, "" for what is not below the folder. */
static const char *place(int dir, const char *path, char *out) {
    out[0] = 0;
    if (!lies()) return out;
    char base[PATH_MAX] = "", link[64];
    if (!path || path[0] != '/') {
        snprintf(link, sizeof link, dir == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dir);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length < 0) return out;
        base[length] = 0;
    }
    if (path && *path)
        snprintf(out, PATH, "%s%s%s", base, *base ? "/" : "", path);
    else
        snprintf(out, PATH, "%s", base);
    size_t length = strlen(under);
    if (strncmp(out, under, length) || (out[length] != '/' && out[length])) out[0] = 0;
    return out;
}

static int real_open(const char *path, int flags) {
    REAL(open64, int, const char *, int, ...);
    return real_open64(path, flags, 0644);
}

static void put(int file, const char *text) {
    REAL(write, ssize_t, int, const void *, size_t);
    if (real_write(file, text, strlen(text)) < 0) abort();
    close(file);
}

/* Whether this call is the one that fails; sets errno. */
static int fails(const char *op, const char *path) {
    if (!*path || strcmp(op, fail_op) || !strstr(path + strlen(under), fail_part)) return 0;
    if (atomic_fetch_add(&seen, 1) + 1 < fail_at) return 0;
    for (long turn = 0; turn < (fail_times ? fail_times : 1000000); turn++) {
        char mark[PATH];
        snprintf(mark, sizeof mark, "%s/fired.%ld", state, turn);
        int file = real_open(mark, O_WRONLY | O_CREAT | O_EXCL);
        if (file < 0) continue;
        put(file, path);
        errno = fail_errno;
        return 1;
    }
    return 0;
}

static void side(const char *kind, const char *path, size_t length, char *out) {
    uint64_t hash = 1469598103934665603ULL;
    for (size_t i = 0; i < length; i++) hash = (hash ^ (unsigned char)path[i]) * 1099511628211ULL;
    snprintf(out, PATH, "%s/%s.%016lx", state, kind, (unsigned long)hash);
}

static long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Whether a path, to its `length`, was renamed a moment ago by another session. */
static int is_late(const char *path, size_t length) {
    char note[PATH], text[64] = "";
    side("late", path, length, note);
    int file = real_open(note, O_RDONLY);
    if (file < 0) return 0;
    ssize_t got = read(file, text, sizeof text - 1);
    close(file);
    long session = 0, when = 0;
    return got > 0 && sscanf(text, "%ld %ld", &session, &when) == 2 && session != getsid(0) &&
           now_ms() - when < late_ms;
}

/* What another node still sees of a path: NULL for nothing, else where it is. */
static const char *seen_at(const char *path, const char *given, char *old) {
    if (!*path || !late_ms) return given;
    for (size_t i = strlen(under) + 1; path[i]; i++)
        if (path[i] == '/' && is_late(path, i)) return errno = ENOENT, NULL;
    if (!is_late(path, strlen(path))) return given;
    side("old", path, strlen(path), old);
    struct statx unused;
    REAL(statx, int, int, const char *, int, unsigned, struct statx *);
    if (real_statx(AT_FDCWD, old, 0, STATX_BASIC_STATS, &unused) == 0) return old;
    return errno = ENOENT, NULL;
}

static void before_rename(const char *to) {
    if (!*to || !late_ms) return;
    REAL(link, int, const char *, const char *);
    char old[PATH];
    side("old", to, strlen(to), old);
    unlink(old);
    real_link(to, old); /* fails for a folder, which is not replaced */
}

static void after_rename(const char *to) {
    if (!*to || !late_ms) return;
    char note[PATH], text[64];
    side("late", to, strlen(to), note);
    snprintf(text, sizeof text, "%ld %ld", (long)getsid(0), now_ms());
    int file = real_open(note, O_WRONLY | O_CREAT | O_TRUNC);
    if (file >= 0) put(file, text);
}

static int open_as(int (*real)(int, const char *, int, ...), int dir, const char *path, int flags, mode_t mode) {
    char where[PATH], old[PATH];
    if (fails("open", place(dir, path, where))) return -1;
    const char *shown = flags & (O_CREAT | (O_TMPFILE & ~O_DIRECTORY)) ? path : seen_at(where, path, old);
    return shown ? real(dir, shown, flags, mode) : -1;
}

#define MODE(flags)                                   \
    mode_t mode = 0;                                  \
    if (flags & (O_CREAT | (O_TMPFILE & ~O_DIRECTORY))) { \
        va_list rest;                                 \
        va_start(rest, flags);                        \
        mode = va_arg(rest, mode_t);                  \
        va_end(rest);                                 \
    }
#define OPEN(name)                                                   \
    int name(const char *path, int flags, ...) {                     \
        REAL(openat64, int, int, const char *, int, ...);            \
        MODE(flags)                                                  \
        return open_as(real_openat64, AT_FDCWD, path, flags, mode);  \
    }
#define OPENAT(name)                                                 \
    int name(int dir, const char *path, int flags, ...) {            \
        REAL(openat64, int, int, const char *, int, ...);            \
        MODE(flags)                                                  \
        return open_as(real_openat64, dir, path, flags, mode);       \
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

/* TYPE NAME(FILE, ...): fails as OP when the file is the one. */
#define ON_FILE(op, type, name, file, parameters, arguments)         \
    type name parameters {                                           \
        static type(*real) parameters;                               \
        if (!real) real = dlsym(RTLD_NEXT, #name);                   \
        char where[PATH];                                            \
        if (lies() && *fail_op && fails(op, place(file, "", where))) return -1; \
        return real arguments;                                       \
    }
ON_FILE("write", ssize_t, write, file, (int file, const void *data, size_t n), (file, data, n))
ON_FILE("write", ssize_t, pwrite, file, (int file, const void *data, size_t n, off_t at), (file, data, n, at))
ON_FILE("write", ssize_t, pwrite64, file, (int file, const void *data, size_t n, off_t at), (file, data, n, at))
ON_FILE("write", ssize_t, writev, file, (int file, const struct iovec *data, int n), (file, data, n))
ON_FILE("write", ssize_t, sendfile, to, (int to, int from, off_t *at, size_t n), (to, from, at, n))
ON_FILE("write", ssize_t, sendfile64, to, (int to, int from, off_t *at, size_t n), (to, from, at, n))
ON_FILE("write", ssize_t, copy_file_range, to,
        (int from, off_t *a, int to, off_t *b, size_t n, unsigned flags), (from, a, to, b, n, flags))
ON_FILE("fsync", int, fsync, file, (int file), (file))
ON_FILE("fsync", int, fdatasync, file, (int file), (file))

int flock(int file, int operation) {
    REAL(flock, int, int, int);
    char where[PATH];
    if (lies() && flock_errno && *place(file, "", where)) return errno = flock_errno, -1;
    return real_flock(file, operation);
}

int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags) {
    REAL(linkat, int, int, const char *, int, const char *, int);
    char where[PATH];
    if (lies() && link_errno && *place(to_dir, to, where)) return errno = link_errno, -1;
    return real_linkat(from_dir, from, to_dir, to, flags);
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    REAL(renameat, int, int, const char *, int, const char *);
    char where[PATH];
    if (fails("rename", place(to_dir, to, where))) return -1;
    before_rename(where);
    int code = real_renameat(from_dir, from, to_dir, to);
    if (code == 0) after_rename(where);
    return code;
}
int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }

static int stat_as(int dir, const char *path, struct stat *out, int flags) {
    REAL(fstatat64, int, int, const char *, struct stat *, int);
    char where[PATH], old[PATH];
    if (fails("stat", place(dir, path, where))) return -1;
    const char *shown = path && *path ? seen_at(where, path, old) : path;
    if (!shown) return -1;
    int code = real_fstatat64(dir, shown, out, flags);
    if (code == 0 && *where && owner >= 0) out->st_uid = owner;
    return code;
}
#define STAT(name, flags) \
    int name(const char *path, struct stat *out) { return stat_as(AT_FDCWD, path, out, flags); } \
    int __x##name(int version, const char *path, struct stat *out) { return (void)version, stat_as(AT_FDCWD, path, out, flags); }
#define LSTAT(name) \
    int l##name(const char *path, struct stat *out) { return stat_as(AT_FDCWD, path, out, AT_SYMLINK_NOFOLLOW); } \
    int __lx##name(int version, const char *path, struct stat *out) { return (void)version, stat_as(AT_FDCWD, path, out, AT_SYMLINK_NOFOLLOW); }
#define FSTAT(name) \
    int f##name(int file, struct stat *out) { return stat_as(file, "", out, AT_EMPTY_PATH); } \
    int __fx##name(int version, int file, struct stat *out) { return (void)version, stat_as(file, "", out, AT_EMPTY_PATH); }
#define FSTATAT(name) \
    int name(int dir, const char *path, struct stat *out, int flags) { return stat_as(dir, path, out, flags); }
STAT(stat, 0) LSTAT(stat) FSTAT(stat) FSTATAT(fstatat)
int stat64(const char *, struct stat64 *) __attribute__((alias("stat")));
int lstat64(const char *, struct stat64 *) __attribute__((alias("lstat")));
int fstat64(int, struct stat64 *) __attribute__((alias("fstat")));
int fstatat64(int, const char *, struct stat64 *, int) __attribute__((alias("fstatat")));
int __xstat64(int, const char *, struct stat64 *) __attribute__((alias("__xstat")));
int __lxstat64(int, const char *, struct stat64 *) __attribute__((alias("__lxstat")));
int __fxstat64(int, int, struct stat64 *) __attribute__((alias("__fxstat")));

int statx(int dir, const char *path, int flags, unsigned mask, struct statx *out) {
    REAL(statx, int, int, const char *, int, unsigned, struct statx *);
    char where[PATH], old[PATH];
    if (fails("stat", place(dir, path, where))) return -1;
    const char *shown = *path ? seen_at(where, path, old) : path;
    if (!shown) return -1;
    int code = real_statx(dir, shown, flags, mask, out);
    if (code == 0 && *where && owner >= 0) out->stx_uid = owner;
    return code;
}

struct dirent64 *readdir64(DIR *folder) {
    REAL(readdir64, struct dirent64 *, DIR *);
    struct dirent64 *entry;
    char where[PATH], old[PATH];
    while ((entry = real_readdir64(folder)) && late_ms)
        if (seen_at(place(dirfd(folder), entry->d_name, where), entry->d_name, old)) break;
    return entry;
}
