package main

import (
	"path/filepath"

	"cal/audit"
	"cal/internal/durable"
	"cal/internal/keyfile"
	"cal/nucleus"
)

// recorder is the authority's own log: every ask and decision, in the tile format, under
// a key of its own.
type recorder struct {
	*audit.Log
	dir string
}

func openLog(dir string) (recorder, error) {
	place := filepath.Join(dir, "log")
	if err := durable.MkdirAll(place, 0o700); err != nil {
		return recorder{}, err
	}
	key, err := keyfile.LoadOrMake(filepath.Join(dir, "log.key"))
	if err != nil {
		return recorder{}, err
	}
	log, err := audit.Open(place, audit.Options{Origin: nucleus.AuthorityLogOrigin, Key: key})
	return recorder{log, place}, err
}

// Record implements authority.Recorder.
func (r recorder) Record(e nucleus.Entry) error {
	_, err := r.Append(e)
	return err
}

// HasUse implements authority.Recorder.
func (r recorder) HasUse(permit string) (bool, error) {
	for raw, err := range audit.Find(r.dir, 0, audit.Filter{Kind: nucleus.KindApprovalUse}) {
		if err != nil {
			return false, err
		}
		if e, err := audit.ParseEntry(raw); err == nil && e.Permit == permit {
			return true, nil
		}
	}
	return false, nil
}
