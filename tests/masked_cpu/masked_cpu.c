/* Loaded before a program (LD_PRELOAD), shows it an x86 CPU that ends at AVX2: CPUID has no AVX-512, no VNNI and no AMX.
 *
 * A CPUID traps and is answered here. It traps by itself where the kernel lets CPUID fault (arch_prctl(2),
 * ARCH_SET_CPUID; Intel since Ivy Bridge), and anywhere if it was overwritten by `int3; nop` (__init__.py).
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012

static int can_fault;
static struct sigaction former;

static void let_cpuid(unsigned long pass) {
    if (can_fault) syscall(SYS_arch_prctl, ARCH_SET_CPUID, pass);
}

static unsigned without(unsigned bits, const char *which, int count) {
    for (int i = 0; i < count; i++) bits &= ~(1u << which[i]);
    return bits;
}

static void answer(greg_t *registers) {
    unsigned leaf = registers[REG_RAX], part = registers[REG_RCX], a, b, c, d;
    /* The bits of leaf 7, Intel's manual volume 2A, CPUID. */
    static const char in_b[] = {16, 17, 21, 26, 27, 28, 30, 31}; /* AVX-512: F DQ IFMA PF ER CD BW VL */
    static const char in_c[] = {1, 6, 11, 12, 14};               /* AVX-512: VBMI VBMI2 VNNI BITALG VPOPCNTDQ */
    static const char in_d[] = {2, 3, 8, 22, 23, 24, 25};        /* AVX-512: 4VNNIW 4FMAPS VP2INTERSECT FP16, AMX */
    let_cpuid(1);
    __cpuid_count(leaf, part, a, b, c, d);
    let_cpuid(0);
    if (leaf == 7 && part == 0) {
        b = without(b, in_b, sizeof in_b);
        c = without(c, in_c, sizeof in_c);
        d = without(d, in_d, sizeof in_d);
    } else if (leaf == 7) { /* AVX-VNNI, AVX512-BF16 and what came later */
        a = b = c = d = 0;
    }
    registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
}

static void on_fault(int signal, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)registers[REG_RIP];
    if (code && code[0] == 0x0f && code[1] == 0xa2) {
        answer(registers);
        registers[REG_RIP] += 2;
    } else {
        sigaction(SIGSEGV, &former, 0); /* a fault of the program, which now happens again */
    }
}

static void on_trap(int signal, siginfo_t *info, void *context) { /* RIP is behind the int3, on the nop */
    answer(((ucontext_t *)context)->uc_mcontext.gregs);
}

__attribute__((constructor)) static void start(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    action.sa_sigaction = on_trap;
    sigaction(SIGTRAP, &action, 0);
    action.sa_sigaction = on_fault;
    sigaction(SIGSEGV, &action, &former);
    can_fault = syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0) == 0;
    if (!can_fault) sigaction(SIGSEGV, &former, 0);
}
