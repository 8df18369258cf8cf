package main

import (
	"crypto/ed25519"
	"errors"
	"path/filepath"
	"slices"
	"sync/atomic"

	"cal/audit"
	"cal/internal/durable"
	"cal/internal/keyfile"
	"cal/nucleus"
)

// recorder is the authority's own log: every ask and decision, in the tile format, under
// a key of its own.
type recorder struct {
	*audit.Log
	dir    string
	key    string      // that verifies it
	failed atomic.Bool // since it was read last
}

func openLog(dir string) (*recorder, error) {
	place := filepath.Join(dir, "log")
	if err := durable.MkdirAll(place, 0o700); err != nil {
		return nil, err
	}
	key, err := keyfile.LoadOrMake(filepath.Join(dir, "log.key"))
	if err != nil {
		return nil, err
	}
	log, err := audit.Open(place, audit.Options{Origin: nucleus.AuthorityLogOrigin, Key: key})
	if err != nil {
		return nil, err
	}
	return &recorder{Log: log, dir: place, key: audit.VerifierKey(nucleus.AuthorityLogOrigin, key.Public().(ed25519.PublicKey))}, nil
}

// Record implements authority.Recorder. A log that failed is read anew from the disk: where there
// is room again it goes on, and an entry that turned up in it all the same is not written twice.
func (r *recorder) Record(e nucleus.Entry) error {
	size := r.Size()
	_, err := r.Append(e)
	if !errors.Is(err, audit.ErrFailed) {
		return err
	}
	r.failed.Store(true)
	if err := r.readAnew(); err != nil {
		return err
	}
	if there, err := r.holds(e, size); there || err != nil {
		return err
	}
	if _, err = r.Append(e); errors.Is(err, audit.ErrFailed) {
		r.failed.Store(true)
	}
	return err
}

// readAnew reads a log that failed anew: only then it is known what it holds.
func (r *recorder) readAnew() error {
	if !r.failed.Load() {
		return nil
	}
	if err := r.Reopen(); err != nil {
		return err
	}
	r.failed.Store(false)
	return nil
}

// holds reports whether an entry is in the log from a place on.
func (r *recorder) holds(e nucleus.Entry, from int64) (bool, error) {
	for raw, err := range audit.Find(r.dir, from, audit.Filter{Kind: e.Kind}) {
		if err != nil {
			return false, err
		}
		there, err := audit.ParseEntry(raw)
		if err == nil && there.Seq >= from && there.Actor == e.Actor && there.Ask == e.Ask && there.Permit == e.Permit && slices.Equal(there.Grants, e.Grants) {
			return true, nil
		}
	}
	return false, nil
}

// HasUse implements authority.Recorder.
func (r *recorder) HasUse(permit string) (bool, error) {
	if err := r.readAnew(); err != nil {
		return false, err
	}
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
