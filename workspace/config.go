package workspace

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v3"

	approvals "cal/approval/client"
	"cal/audit"
)

// Config is what the person set in CAL_HOME/config.yaml. Without the file it is zero.
type Config struct {
	Log struct {
		// Witnesses must cosign the log: without them the node begins no effect.
		Witnesses []Witness `yaml:"witnesses"`
	} `yaml:"log"`
	Approvals struct {
		// Notify is a program and its arguments that the authority runs for a new ask.
		Notify []string `yaml:"notify"`
		// Desktop shows a desktop notification for a new ask; nil is true.
		Desktop *bool `yaml:"desktop"`
		// Require is "other-user", or empty: no pod starts where that is not so.
		Require string `yaml:"require"`
	} `yaml:"approvals"`
}

// Witness is a C2SP tlog-witness.
type Witness struct {
	URL string `yaml:"url"` // submission prefix
	Key string `yaml:"key"` // its cosignature key, in signed-note form
}

// Config reads and checks config.yaml. An unknown key is an error.
func (h Home) Config() (Config, error) {
	name := filepath.Join(h.Dir, "config.yaml")
	var c Config
	raw, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return c, err
	}
	dec := yaml.NewDecoder(bytes.NewReader(raw))
	dec.KnownFields(true)
	if err := dec.Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		return Config{}, fmt.Errorf("%s: %w", name, err)
	}
	if argv := c.Approvals.Notify; argv != nil {
		// One with a slash that is not absolute would be looked for where the daemon stands.
		if len(argv) == 0 || argv[0] == "" || strings.Contains(argv[0], "/") && !filepath.IsAbs(argv[0]) {
			return Config{}, fmt.Errorf("%s: approvals.notify is %q, want a program, by its name on PATH or its absolute path, and its arguments", name, argv)
		}
	}
	if err := approvals.CheckRequirement(c.Approvals.Require); err != nil {
		return Config{}, fmt.Errorf("%s: approvals.require: %w", name, err)
	}
	for i, w := range c.Log.Witnesses {
		u, err := url.Parse(w.URL)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return Config{}, fmt.Errorf("%s: log.witnesses[%d].url is %q, want an http or https URL", name, i, w.URL)
		}
		if err := audit.CheckWitnessKey(w.Key); err != nil {
			return Config{}, fmt.Errorf("%s: log.witnesses[%d].key: %w", name, i, err)
		}
	}
	return c, nil
}
