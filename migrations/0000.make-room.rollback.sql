-- Give the replaced system's table its own name back, with the rows that it had at the take-over.
SET lock_timeout = '3s';
ALTER TABLE IF EXISTS incidents_replaced RENAME TO incidents;
ALTER INDEX IF EXISTS incidents_replaced_pkey RENAME TO incidents_pkey;
ALTER SEQUENCE IF EXISTS incidents_replaced_id_seq RENAME TO incidents_id_seq;
