// Command nucleus-node is the control plane of CAL: pods, the request path, the
// log, the gateway. cal starts it when none runs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	approvals "cal/approval/client"
	"cal/egress/prices"
	"cal/image"
	"cal/internal/confine"
	"cal/internal/kvm"
	"cal/machine"
	"cal/machine/firecracker"
	"cal/machine/gvisor"
	"cal/machine/qemu"
	"cal/machine/site"
	"cal/node"
)

func main() {
	kvm.Main()     // the child that tries whether KVM runs a guest
	confine.Main() // the child that becomes a VMM
	if err := run(os.Args[1:]); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			os.Exit(2)
		}
		fmt.Fprintln(os.Stderr, "nucleus-node:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	flags := flag.NewFlagSet("nucleus-node", flag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "nucleus-node serves pods on DIR/run/node.sock until it is told to stop.\n\nExample: nucleus-node --home ~/.cal")
		flags.PrintDefaults()
	}
	// A machine's users, who are others than the node's, read what is made for them; what nobody
	// else may read is made so.
	syscall.Umask(0o022)
	home := flags.String("home", "", "CAL_HOME, made if it does not exist (required)")
	authority := flags.String("authority", "", "socket of nucleus-authority; without it nobody can approve")
	require := flags.String("require-approvals", "", "start no pod unless approvals come from another user of the host, or by passkey: other-user (other-user:UID for one user alone) or passkey")
	proxy := flags.String("proxy", beside("nucleus-tool-proxy"), "the static nucleus-tool-proxy")
	runsc := flags.String("runsc", beside("runsc"), "gVisor's runsc")
	vmm := flags.String("firecracker", onPath("firecracker"), "Firecracker, which wants a node of root's and a KVM that runs guests")
	jailer := flags.String("jailer", onPath("jailer"), "Firecracker's jailer, of the same version")
	emulator := flags.String("qemu", onPath("qemu-system-x86_64"), "QEMU for x86-64")
	forge := flags.String("github-api", "", "base URL of GitHub's API, for GitHub Enterprise")
	var witnesses []node.Witness
	flags.Func("witness", "URL and key of a C2SP tlog-witness that must cosign the log, in one argument; may be repeated", func(text string) error {
		url, key, ok := strings.Cut(text, " ")
		if !ok {
			return fmt.Errorf("want a URL, a space and a key, got %q", text)
		}
		witnesses = append(witnesses, node.Witness{URL: url, Key: key})
		return nil
	})
	patience := flags.Duration("probe-patience", 0, "how long a guest may take to show that KVM runs it, longer on a host that is emulated itself (default: the drivers' own)")
	spare := flags.Duration("spare", 5*time.Minute, "how long a machine made ahead waits for the next pod of its shape; 0 makes none")
	spareEmulated := flags.Bool("spare-emulated", false, "make machines of tier emulated ahead too: one takes some 350 MB and a part of a processor all the while it waits")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *home == "" || flags.NArg() > 0 {
		flags.Usage()
		return flag.ErrHelp
	}
	table, err := priceTable(filepath.Join(*home, "prices.yaml"))
	if err != nil {
		return err
	}
	if err := approvals.CheckRequirement(*require); err != nil {
		return fmt.Errorf("--require-approvals: %w", err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	images, err := image.Open(filepath.Join(*home, "images"))
	if err != nil {
		return err
	}
	host, probes := &kvm.Host{Patience: *patience}, node.Dirs{Home: *home}.Probes()
	accelerated, emulated := qemu.New(qemu.Config{QEMU: *emulator, Images: images, Proxy: *proxy, Fetch: true, Scratch: probes, KVM: host})
	drivers := []machine.Driver{ // the strongest first
		firecracker.New(firecracker.Config{Firecracker: *vmm, Jailer: *jailer, Images: images, Snapshots: filepath.Join(*home, "run", "warm"), Scratch: probes, KVM: host, Patience: *patience}),
		accelerated,
		gvisor.New(gvisor.Config{Runsc: *runsc, Images: images, Scratch: probes}),
		emulated,
	}
	if err := site.ClearTrials(ctx, probes, drivers...); err != nil {
		slog.Warn("what an earlier node left that ended while it probed is still there", "error", err)
	}
	n, err := node.Open(ctx, node.Config{
		Home:      *home,
		Drivers:   drivers,
		Images:    images,
		Proxy:     *proxy,
		Authority: *authority,
		Witnesses: witnesses,
		GitHub:    node.Forge{API: *forge, Token: token()},
		Stop:      stop,
		SpareLife: *spare,
		Prices:    table,

		SpareEmulated:    *spareEmulated,
		RequireApprovals: *require,
	})
	if err != nil {
		return err
	}
	err = n.Serve(ctx)
	slog.Info("node stops; its machines wait for the next one")
	return errors.Join(err, n.Close())
}

// priceTable is the built-in one, with the person's own over it.
func priceTable(path string) (*prices.Table, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return prices.Builtin(), nil
	}
	if err != nil {
		return nil, err
	}
	own, err := prices.Parse(path, raw)
	if err != nil {
		return nil, err
	}
	return prices.Builtin().Over(own), nil
}

// token takes the forge's token out of the environment, so that no child has it.
func token() string {
	for _, name := range []string{"GH_TOKEN", "GITHUB_TOKEN"} {
		if value := os.Getenv(name); value != "" {
			os.Unsetenv("GH_TOKEN")
			os.Unsetenv("GITHUB_TOKEN")
			return value
		}
	}
	return ""
}

// onPath is a program that CAL does not bring; "" where there is none.
func onPath(name string) string {
	path, err := exec.LookPath(name)
	if err != nil {
		return ""
	}
	if path, err = filepath.Abs(path); err != nil {
		return ""
	}
	return path
}

func beside(name string) string {
	self, err := os.Executable()
	if err != nil {
		return name
	}
	if real, err := filepath.EvalSymlinks(self); err == nil {
		self = real
	}
	return filepath.Join(filepath.Dir(self), name)
}
