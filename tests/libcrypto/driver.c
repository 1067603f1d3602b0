/*
 * Runs scenarios on libcrypto's ASYNC_* functions and prints what each operation returned.
 *
 * A scenario on stdin is one operation a line, "<script> <operation> <numbers>", and a line
 * "run" at its end. The script is "main", for what the driver of the jobs does, or "job0",
 * "job1", ..., for what the function of that job does. The answer on stdout is each operation
 * that was carried out, with " -> " and its result, and a line "end". An operation that the
 * state forbids is not carried out, and its result is "skipped". test_libcrypto_traces.py says
 * which those are, and does the same with aiojob.
 */
#include <openssl/async.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { JOBS = 8, CONTEXTS = 8, KEYS = 8, OPERATIONS = 256, NUMBERS = 5, FDS = 4096, LINE = 80 };

struct operation;
typedef int handler_fn(const struct operation *op, const int *n);

struct operation {
    char text[LINE];
    handler_fn *handler;
    int n[NUMBERS];
};

struct script {
    struct operation operations[OPERATIONS];
    int length;
};

struct job {
    struct script script;
    ASYNC_JOB *handle;    /* from its first step to its end */
    ASYNC_WAIT_CTX *wctx; /* the same; NULL while the job is not under way */
    int blocks;
};

struct arguments {
    int job;
    int ret;
};

static struct script main_script;
static struct job jobs[JOBS];
static ASYNC_WAIT_CTX *contexts[CONTEXTS];
static char keys[KEYS];

/* -- names for what libcrypto returns */

static void die(const char *what)
{
    fprintf(stderr, "driver.c: %s\n", what);
    exit(2);
}

static const void *key(int number)
{
    return number == 0 ? NULL : &keys[number];
}

static int number_of_key(const void *pointer)
{
    return pointer == NULL ? 0 : (int)((const char *)pointer - keys);
}

static void *pointer_to(int number)
{
    return (void *)(intptr_t)number;
}

static int number_in(const void *pointer)
{
    return (int)(intptr_t)pointer;
}

static void print_job(const ASYNC_JOB *handle)
{
    if (handle == NULL) {
        printf(" null");
        return;
    }
    for (int i = 0; i < JOBS; i++) {
        if (jobs[i].handle == handle) {
            printf(" job%d", i);
            return;
        }
    }
    printf(" unknown job");
}

static void print_context(const ASYNC_WAIT_CTX *ctx)
{
    for (int i = 0; i < CONTEXTS; i++) {
        if (contexts[i] == ctx) {
            printf(" ctx%d", i);
            return;
        }
    }
    printf(" unknown ctx");
}

static void print_fds(const char *title, const OSSL_ASYNC_FD *fds, size_t count)
{
    printf(" %s %zu:", title, count);
    for (size_t i = 0; i < count; i++)
        printf(" %d", fds[i]);
}

/* The operation's own lines, of a job that it ran or of cleanups, come before this. */
static void answer(const struct operation *op)
{
    printf("%s ->", op->text);
}

static int print_number(const struct operation *op, int number)
{
    answer(op);
    printf(" %d", number);
    return 1;
}

/* -- wait contexts */

static int in_use(const ASYNC_WAIT_CTX *ctx)
{
    for (int i = 0; i < JOBS; i++)
        if (jobs[i].wctx == ctx)
            return 1;
    return 0;
}

static void cleanup(ASYNC_WAIT_CTX *ctx, const void *key, OSSL_ASYNC_FD fd, void *custom_data)
{
    printf("cleanup");
    print_context(ctx);
    printf(" %d %d %d\n", number_of_key(key), fd, number_in(custom_data));
}

static int callback_1(void *arg)
{
    printf("callback 1 %d\n", number_in(arg));
    return 1;
}

static int callback_2(void *arg)
{
    printf("callback 2 %d\n", number_in(arg));
    return 0;
}

static int do_new(const struct operation *op, const int *n)
{
    if (contexts[n[0]] != NULL)
        return 0;
    contexts[n[0]] = ASYNC_WAIT_CTX_new();
    return print_number(op, contexts[n[0]] != NULL);
}

static int do_free(const struct operation *op, const int *n)
{
    ASYNC_WAIT_CTX *ctx = contexts[n[0]];

    if (ctx == NULL || in_use(ctx))
        return 0;
    ASYNC_WAIT_CTX_free(ctx);
    contexts[n[0]] = NULL;
    answer(op);
    printf(" freed");
    return 1;
}

static int do_set(const struct operation *op, const int *n)
{
    ASYNC_WAIT_CTX *ctx = contexts[n[0]];

    if (ctx == NULL)
        return 0;
    return print_number(op, ASYNC_WAIT_CTX_set_wait_fd(ctx, key(n[1]), n[2], pointer_to(n[3]),
                                                       n[4] ? cleanup : NULL));
}

static int do_get(const struct operation *op, const int *n)
{
    OSSL_ASYNC_FD fd;
    void *custom_data;

    if (contexts[n[0]] == NULL)
        return 0;
    if (!ASYNC_WAIT_CTX_get_fd(contexts[n[0]], key(n[1]), &fd, &custom_data)) {
        answer(op);
        printf(" none");
        return 1;
    }
    answer(op);
    printf(" %d %d", fd, number_in(custom_data));
    return 1;
}

static int do_all(const struct operation *op, const int *n)
{
    static OSSL_ASYNC_FD fds[FDS];
    size_t count = 0;

    if (contexts[n[0]] == NULL)
        return 0;
    if (!ASYNC_WAIT_CTX_get_all_fds(contexts[n[0]], NULL, &count) || count > FDS)
        die("get_all_fds");
    ASYNC_WAIT_CTX_get_all_fds(contexts[n[0]], fds, &count);
    answer(op);
    print_fds("fds", fds, count);
    return 1;
}

static int do_changed(const struct operation *op, const int *n)
{
    static OSSL_ASYNC_FD added[FDS], deleted[FDS];
    ASYNC_WAIT_CTX *ctx = contexts[n[0]];
    size_t count_added = 0, count_deleted = 0;

    if (ctx == NULL)
        return 0;
    if (!ASYNC_WAIT_CTX_get_changed_fds(ctx, NULL, &count_added, NULL, &count_deleted)
        || count_added > FDS || count_deleted > FDS)
        die("get_changed_fds");
    /* What libcrypto counts but does not list shows as -1. */
    memset(added, -1, sizeof(added));
    memset(deleted, -1, sizeof(deleted));
    ASYNC_WAIT_CTX_get_changed_fds(ctx, added, &count_added, deleted, &count_deleted);
    answer(op);
    print_fds("added", added, count_added);
    print_fds("deleted", deleted, count_deleted);
    return 1;
}

static int do_clear(const struct operation *op, const int *n)
{
    if (contexts[n[0]] == NULL)
        return 0;
    return print_number(op, ASYNC_WAIT_CTX_clear_fd(contexts[n[0]], key(n[1])));
}

static int do_set_callback(const struct operation *op, const int *n)
{
    ASYNC_callback_fn callback = n[1] == 1 ? callback_1 : n[1] == 2 ? callback_2 : NULL;

    if (contexts[n[0]] == NULL)
        return 0;
    return print_number(op, ASYNC_WAIT_CTX_set_callback(contexts[n[0]], callback,
                                                        pointer_to(n[2])));
}

static int do_callback(const struct operation *op, const int *n)
{
    ASYNC_callback_fn callback = NULL;
    void *arg = NULL;
    int found;

    if (contexts[n[0]] == NULL)
        return 0;
    found = ASYNC_WAIT_CTX_get_callback(contexts[n[0]], &callback, &arg);
    if (found)
        callback(arg);
    answer(op);
    printf(found ? " called" : " none");
    return 1;
}

static int do_set_status(const struct operation *op, const int *n)
{
    if (contexts[n[0]] == NULL)
        return 0;
    return print_number(op, ASYNC_WAIT_CTX_set_status(contexts[n[0]], n[1]));
}

static int do_status(const struct operation *op, const int *n)
{
    if (contexts[n[0]] == NULL)
        return 0;
    return print_number(op, ASYNC_WAIT_CTX_get_status(contexts[n[0]]));
}

/* -- jobs */

static void perform(const struct script *script)
{
    for (int i = 0; i < script->length; i++) {
        const struct operation *op = &script->operations[i];

        if (!op->handler(op, op->n)) {
            answer(op);
            printf(" skipped");
        }
        putchar('\n');
    }
}

static int body(void *copied)
{
    struct arguments *arguments = copied;
    struct job *job = &jobs[arguments->job];

    job->handle = ASYNC_get_current_job();
    job->blocks = 0;
    perform(&job->script);
    while (job->blocks-- > 0) /* libcrypto would leave the next job of the thread blocked */
        ASYNC_unblock_pause();
    return arguments->ret;
}

static int advance(int number, ASYNC_WAIT_CTX *ctx, int ret, int *result)
{
    struct arguments arguments = { number, ret };
    ASYNC_JOB *handle = jobs[number].handle;
    int status = ASYNC_start_job(&handle, ctx, result, body, &arguments, sizeof(arguments));

    if (status == ASYNC_PAUSE) {
        if (handle != jobs[number].handle)
            die("the handle of a job changed");
        return status;
    }
    if (handle != NULL)
        die("a handle remained of a job that is not paused");
    jobs[number].handle = NULL;
    jobs[number].wctx = NULL;
    return status;
}

static int print_advance(const struct operation *op, int number, int status, int ret)
{
    answer(op);
    if (status == ASYNC_FINISH)
        printf(" FINISH %d", ret);
    else if (status == ASYNC_PAUSE) {
        printf(" PAUSE");
        print_job(jobs[number].handle);
    } else
        printf(status == ASYNC_NO_JOBS ? " NO_JOBS" : " ERR");
    return 1;
}

static int do_start(const struct operation *op, const int *n)
{
    int ret = 0, status;

    if (jobs[n[0]].wctx != NULL || contexts[n[1]] == NULL || in_use(contexts[n[1]]))
        return 0;
    jobs[n[0]].wctx = contexts[n[1]];
    status = advance(n[0], contexts[n[1]], n[2], &ret);
    return print_advance(op, n[0], status, ret);
}

static int do_resume(const struct operation *op, const int *n)
{
    int ret = 0, status;

    if (jobs[n[0]].wctx == NULL)
        return 0;
    status = advance(n[0], contexts[n[1]], -1, &ret); /* all but the handle is ignored */
    return print_advance(op, n[0], status, ret);
}

static int do_finish(const struct operation *op, const int *n)
{
    int ret = 0, status = ASYNC_PAUSE, resumes = 0;

    if (jobs[n[0]].wctx == NULL)
        return 0;
    while (status == ASYNC_PAUSE) {
        status = advance(n[0], NULL, -1, &ret);
        resumes++;
    }
    print_advance(op, n[0], status, ret);
    printf(" after %d", resumes);
    return 1;
}

static int do_pause(const struct operation *op, const int *n)
{
    (void)n;
    return print_number(op, ASYNC_pause_job());
}

static struct job *current_job(void)
{
    ASYNC_JOB *handle = ASYNC_get_current_job();

    for (int i = 0; handle != NULL && i < JOBS; i++)
        if (jobs[i].handle == handle)
            return &jobs[i];
    return NULL;
}

static int do_block(const struct operation *op, const int *n)
{
    struct job *job = current_job();

    (void)n;
    if (job != NULL)
        job->blocks++;
    ASYNC_block_pause();
    answer(op);
    return 1;
}

static int do_unblock(const struct operation *op, const int *n)
{
    struct job *job = current_job();

    (void)n;
    if (job != NULL && job->blocks > 0)
        job->blocks--;
    ASYNC_unblock_pause();
    answer(op);
    return 1;
}

static int do_current(const struct operation *op, const int *n)
{
    ASYNC_JOB *handle = ASYNC_get_current_job();

    (void)n;
    answer(op);
    print_job(handle);
    return 1;
}

static int do_wait_ctx(const struct operation *op, const int *n)
{
    if (jobs[n[0]].wctx == NULL)
        return 0;
    answer(op);
    print_context(ASYNC_get_wait_ctx(jobs[n[0]].handle));
    return 1;
}

static int do_capable(const struct operation *op, const int *n)
{
    (void)n;
    return print_number(op, ASYNC_is_capable());
}

/* -- the thread's pool */

static int any_job(void)
{
    for (int i = 0; i < JOBS; i++)
        if (jobs[i].wctx != NULL)
            return 1;
    return 0;
}

/* Called again, libcrypto leaks the pool that it had. */
static int do_init(const struct operation *op, const int *n)
{
    return any_job() ? 0 : print_number(op, ASYNC_init_thread(n[0], n[1]));
}

static int do_cleanup(const struct operation *op, const int *n)
{
    (void)n;
    if (any_job())
        return 0;
    ASYNC_cleanup_thread();
    answer(op);
    return 1;
}

/* -- reading scenarios */

static const struct {
    const char *name;
    handler_fn *handler;
} handlers[] = {
    { "new", do_new },
    { "free", do_free },
    { "set", do_set },
    { "get", do_get },
    { "all", do_all },
    { "changed", do_changed },
    { "clear", do_clear },
    { "set_callback", do_set_callback },
    { "callback", do_callback },
    { "set_status", do_set_status },
    { "status", do_status },
    { "start", do_start },
    { "resume", do_resume },
    { "finish", do_finish },
    { "pause", do_pause },
    { "block", do_block },
    { "unblock", do_unblock },
    { "current", do_current },
    { "wait_ctx", do_wait_ctx },
    { "capable", do_capable },
    { "init", do_init },
    { "cleanup", do_cleanup },
};

static handler_fn *handler_of(const char *name)
{
    for (size_t i = 0; i < sizeof(handlers) / sizeof(handlers[0]); i++)
        if (strcmp(handlers[i].name, name) == 0)
            return handlers[i].handler;
    die("no such operation");
    return NULL;
}

static struct script *script_of(const char *name)
{
    int number;

    if (strcmp(name, "main") == 0)
        return &main_script;
    if (sscanf(name, "job%d", &number) != 1 || number < 0 || number >= JOBS)
        die("no such script");
    return &jobs[number].script;
}

static void read_operation(const char *line)
{
    char script_name[16], name[16];
    struct operation op = { 0 };
    struct script *script;

    if (sscanf(line, "%15s %15s %d %d %d %d %d", script_name, name, &op.n[0], &op.n[1], &op.n[2],
               &op.n[3], &op.n[4]) < 2)
        die("not an operation");
    strcpy(op.text, line);
    op.handler = handler_of(name);
    script = script_of(script_name);
    if (script->length == OPERATIONS)
        die("too many operations");
    script->operations[script->length++] = op;
}

static void run(void)
{
    perform(&main_script);
    puts("end");
    fflush(stdout);
    main_script.length = 0;
    for (int i = 0; i < JOBS; i++)
        jobs[i].script.length = 0;
}

int main(void)
{
    static char output[1 << 16];
    char line[LINE];

    setvbuf(stdout, output, _IOFBF, sizeof(output));
    while (fgets(line, sizeof(line), stdin) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        if (strcmp(line, "run") == 0)
            run();
        else
            read_operation(line);
    }
    return 0;
}
