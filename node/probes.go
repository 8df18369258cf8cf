package node

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"cal/machine"
	"cal/nucleus"
)

// probes remembers, for the node's life, which drivers have run guest code here.
type probes struct {
	mu      sync.Mutex
	results map[driverKey]error
	digest  string
}

// driverKey tells drivers apart: one name may stand for several kinds of machines, of
// which the strongest comes first.
type driverKey struct {
	Name string
	Tier nucleus.Tier
}

func keyOf(d machine.Driver) driverKey { return driverKey{d.Name(), d.Tier()} }

// probeDeadline leaves time to fetch a kernel, the first time; the guest has the driver's own.
const probeDeadline = 2 * time.Minute

// probe asks the driver once.
func (n *Node) probe(ctx context.Context, d machine.Driver) error {
	n.probes.mu.Lock()
	defer n.probes.mu.Unlock()
	if err, ok := n.probes.results[keyOf(d)]; ok && err == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeDeadline)
	defer cancel()
	err := d.Probe(ctx)
	if n.probes.results == nil {
		n.probes.results = map[driverKey]error{}
	}
	n.probes.results[keyOf(d)] = err
	return err
}

// chooseDriver takes the named driver, or the strongest whose probe succeeds; what
// is weaker than required is never taken.
func (n *Node) chooseDriver(ctx context.Context, spec nucleus.PodSpec) (machine.Driver, error) {
	switch spec.Require {
	case "", nucleus.TierVM, nucleus.TierKernel:
	default:
		return nil, nucleus.Errorf(nucleus.KindInvalid, "required tier %q: want %q or %q", spec.Require, nucleus.TierVM, nucleus.TierKernel)
	}
	what := "no machine"
	if spec.Require != "" {
		what = "no machine of tier " + string(spec.Require)
	}
	var reasons []string
	for _, d := range n.config.Drivers {
		if spec.Driver != "" && spec.Driver != d.Name() {
			continue
		}
		if spec.Driver == "" && !d.Tier().Satisfies(spec.Require) || spec.Require != "" && !d.Tier().Satisfies(spec.Require) {
			reasons = append(reasons, fmt.Sprintf("%s is of tier %s", d.Name(), d.Tier()))
			continue
		}
		err := n.probe(ctx, d)
		if err == nil {
			return d, nil
		}
		reason := fmt.Sprintf("%s: %v", d.Name(), err)
		var failed *machine.ProbeError
		if errors.As(err, &failed) && failed.Mend != "" {
			reason += " (" + failed.Mend + ")"
		}
		reasons = append(reasons, reason)
	}
	if len(reasons) == 0 {
		return nil, nucleus.Errorf(nucleus.KindInvalid, "no driver %q (cal doctor lists them)", spec.Driver)
	}
	return nil, nucleus.Errorf(nucleus.KindUnavailable, "%s can be started here: %s", what, strings.Join(reasons, "; "))
}

// driver is that of a pod's record.
func (n *Node) driver(r record) (machine.Driver, error) {
	for _, d := range n.config.Drivers {
		if keyOf(d) == (driverKey{r.Driver, r.Tier}) {
			return d, nil
		}
	}
	return nil, fmt.Errorf("no driver %q of tier %s", r.Driver, r.Tier)
}

func (n *Node) operatorKeyFile() string { return filepath.Join(n.dirs.Keys(), "operator.key") }

// proxyDigest is the SHA-256 of the proxy that machines run.
func (n *Node) proxyDigest() string {
	n.probes.mu.Lock()
	defer n.probes.mu.Unlock()
	if n.probes.digest == "" {
		n.probes.digest = fileDigest(n.config.Proxy)
	}
	return n.probes.digest
}

func fileDigest(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return ""
	}
	return hex.EncodeToString(h.Sum(nil))
}
