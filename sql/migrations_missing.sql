-- Those of the named migrations that this database has not had yet.
--   $1 names  text[]
SELECT coalesce(array_agg(name ORDER BY name), '{}') AS names
  FROM unnest($1::text[]) AS wanted (name)
 WHERE name NOT IN (SELECT migration_id FROM _yoyo_migration);
